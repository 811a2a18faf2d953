"""The command line: presets, help for every flag, exit statuses."""

import dataclasses
import sys
import types

import pytest

from dar_train import cli, reporting
from dar_train.recipes import ClassifierRecipe, PriorRecipe, TokenizerRecipe
from dar_train.recipes.files import field_help, grouped


@pytest.fixture
def parsed(monkeypatch):
    seen = []
    stand_in = types.SimpleNamespace(train_tokenizer=seen.append)
    monkeypatch.setitem(sys.modules, "dar_train.tokenizer_loop", stand_in)
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
        ("classifier --data /nowhere --warmup 3000", "warmup: expected fewer than the 2000 steps"),
    ],
)
def test_bad_usage_exits_with_2(line, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "--" in capsys.readouterr().out
    assert cli.COMMANDS[command].__doc__


def test_overview(capsys) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


@pytest.mark.parametrize("recipe", [TokenizerRecipe, PriorRecipe, ClassifierRecipe])
def test_every_flag_has_help(recipe) -> None:
    assert field_help(recipe).keys() == {field.name for field in dataclasses.fields(recipe)}
    assert all(field_help(recipe).values())
    assert "other" not in grouped(recipe)


def test_help_is_in_groups(capsys) -> None:
    assert cli.main(["prior", "--help"]) == 0
    shown = capsys.readouterr().out
    for title in ("run", "model", "data", "optimizer", "schedule", "scale", "reports"):
        assert f" {title} options " in shown
    assert "--ten-crop" in shown
    assert "recipe file; its values" in " ".join(shown.split())


def test_flags_win_over_the_file_and_the_file_over_the_preset(parsed, tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'preset = "v1"\nbatch = 96\nlr = 1\nminutes = "none"\noverride = ["num_steps=4"]\n'
        "[model.dit]\ndepth = 3\nrepa_layer = 2\n"
    )
    line = f"tokenizer --recipe {file} --batch 32 --micro-batch 4 --override dit.depth=4"
    assert cli.main(line.split()) == 0
    (recipe,) = parsed
    assert (recipe.preset, recipe.steps, recipe.batch, recipe.lr) == ("v1", 210_000, 32, 1.0)
    assert recipe.override == ("num_steps=4", "dit.depth=4", "dit.repa_layer=2")
    assert recipe.config().dit.depth == 4
    assert cli.main(["tokenizer", "--preset", "lite", "--recipe", str(file)]) == 0
    assert (parsed[1].preset, parsed[1].model) == ("lite", "lite")


def test_shown_recipes_are_recipe_files(parsed, tmp_path, capsys) -> None:
    assert (
        cli.main("show tokenizer --preset v1-4096 --steps None --minutes 3 --seed 9".split()) == 0
    )
    file = tmp_path / "shown.toml"
    file.write_text(capsys.readouterr().out)
    assert cli.main(["tokenizer", "--recipe", str(file)]) == 0
    (recipe,) = parsed
    assert (recipe.seed, recipe.steps, recipe.minutes) == (9, None, 3.0)
    assert recipe.config().codebook_size == 4096
    assert cli.main(["show", "tokenizer", "--recipe", str(file)]) == 0
    assert capsys.readouterr().out == file.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prior --preset XXM", "got 'XXM'; did you mean 'XXL'?"),
        ("prior --preset", "--preset"),
        ("priro", "got 'priro'; did you mean 'prior'?"),
        ("prior --bathc 3", "did you mean --batch?"),
        ("prior --lr fast", "--lr: expected a number, got 'fast'"),
        ("prior --recipe /nowhere/x.toml", "recipe: expected a readable file"),
        ("show prior --override dpeth=3", "got 'dpeth=3'; did you mean 'depth'?"),
        ("show priro", "got 'priro'; did you mean 'prior'?"),
        ("show", "show: expected tokenizer|prior|classifier, got none"),
        ("demo --call-minutes 0", "call_minutes: expected a positive number, got 0"),
        ("emoji --size 3", "size: expected 8..256, got 3"),
    ],
)
def test_what_is_wrong_is_named(line, message, capsys) -> None:
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_all_problems_are_named_together(capsys) -> None:
    assert cli.main("tokenizer --batch 0 --lr -1 --ema 2".split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("dar train: error: 3 problems:\n  batch: expected a positive number")
    assert len(error.splitlines()) == 4


@pytest.mark.parametrize(("rank", "said"), [("0", "hello\n"), ("3", "")])
def test_one_rank_speaks(rank, said, monkeypatch, capsys) -> None:
    def train(recipe) -> None:
        reporting.logger.info("hello")

    stand_in = types.SimpleNamespace(train_tokenizer=train)
    monkeypatch.setitem(sys.modules, "dar_train.tokenizer_loop", stand_in)
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["tokenizer"]) == 0
    assert capsys.readouterr().out.partition(" ")[2] == said
