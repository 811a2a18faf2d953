"""The command line: presets, help for every flag, exit statuses."""

import dataclasses

import pytest

from dar_train import cli, tokenizer_loop
from dar_train.recipes import ClassifierRecipe, PriorRecipe, TokenizerRecipe


@pytest.fixture
def parsed(monkeypatch):
    seen = []
    monkeypatch.setattr(tokenizer_loop, "train_tokenizer", seen.append)
    return seen


def test_preset_then_flags(parsed) -> None:
    line = "tokenizer --preset v1 --data x --minutes 3 --batch 7 --micro-batch 3 --augment"
    assert cli.main(line.split()) == 0
    (recipe,) = parsed
    assert isinstance(recipe, TokenizerRecipe)
    assert (recipe.model, recipe.steps, recipe.minutes) == ("v1", 210_000, 3.0)
    assert (recipe.batch, recipe.micro_batch, recipe.augment) == (7, 3, True)


def test_demo_is_the_default_preset(parsed) -> None:
    assert cli.main(["tokenizer", "--no-augment"]) == 0
    assert parsed[0].model == "demo"
    assert not parsed[0].augment


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tokenizer --preset huge", "preset: expected one of"),
        ("tokenizer --batch 0", "batch: expected a positive number, got 0"),
        ("walk", "dar train: expected one of"),
        ("tokenizer --data /nowhere --minutes 1 --device cpu", "data: expected a packed file"),
    ],
)
def test_bad_usage_exits_with_2(line, message, capsys) -> None:
    try:
        status = cli.main(line.split())
    except SystemExit as stop:  # tyro's own message
        status = stop.code
    assert status == 2
    captured = capsys.readouterr()
    assert message in captured.out + captured.err


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert "--" in capsys.readouterr().out
    assert cli.COMMANDS[command].__doc__


def test_overview(capsys) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("recipe", [TokenizerRecipe, PriorRecipe, ClassifierRecipe])
def test_every_flag_has_help(recipe) -> None:
    from tyro._docstrings import get_field_docstring

    for field in dataclasses.fields(recipe):
        assert get_field_docstring(recipe, field.name, ()), field.name
