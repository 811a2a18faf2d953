"""A card says what its report says, and nothing that the report lacks."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import dar_fast
from dar_train import cli
from dar_train.card import CardRecipe, write_card
from dar_train.distributed import Ranks
from dar_train.recipes import PRIOR_DEMO, TOKENIZER_DEMO
from dar_train.runs import begin, command_of, describe_run

OLDER = Path(dar_fast.__file__).parent / "assets" / "demo" / "report.json"
CPU = Ranks(0, 1, 0, torch.device("cpu"))


def _psnr(mean: float) -> dict[str, float]:
    return {"psnr": mean, "psnr_of_mean": mean - 1}


CALL = {
    "type": "cpu", "device": "A Processor", "cores": 2, "threads": 2, "ranks": 1,
    "command": "dar train tokenizer --preset demo --minutes 60",
}  # fmt: skip
REPORT = {
    "pictures": {
        "train": 6634, "held_out": 763, "held_out_names": 193,
        "styles": ["fluent-3d", "fluent-flat", "noto", "twemoji"],
    },
    "models": {
        "tokenizer_parameters": 8_960_000, "prior_parameters": 6_540_000, "image_size": 32,
        "num_tokens": 64, "num_groups": 8, "num_steps": 8, "codebook_size": 4096, "labels": 391,
    },
    "baselines": {"mean": _psnr(11.6), "components": _psnr(19.5)},
    "tokenizer": {
        **_psnr(20.25), "psnr_by_style": {"noto": 20.0, "twemoji": 20.5},
        "previews": [{"groups": 1, "psnr": 17.5}, {"groups": 8, "psnr": 20.25}],
        "codes_held_out": {"codes_used": 0.95, "perplexity": 2700.4},
    },
    "prior": {
        "cross_entropy": 3.0, "cross_entropy_train": 2.5, "unigram_cross_entropy": 8.05,
        "unigram_entropy": 8.0,
    },
    "settings": {"guidance": 4.0, "top_p": 1.0, "temperature": 1.0, "samples": 384},
    "classifier": {
        key: {"style": 0.5, "subgroup": 0.3, "both": 0.2}
        for key in ("held_out", "reconstructions", "samples")
    },
    "machine": {"versions": {"dar_fast": "1.0", "torch": "2.13"}},
    "runs": [
        {
            "name": "tokE", "kind": "tokenizer", "step": 5000, "minutes": 100.0,
            "calls": [CALL, CALL], "recipe": {"optimizer": "muon", "rollout": 2.0},
        },
        {"name": "prior", "kind": "prior", "step": 900, "minutes": 20.0},
        {"name": "judge", "kind": "classifier", "step": 700, "minutes": 5.0},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.json").write_text(json.dumps(REPORT))
    for name in ("samples", "curves-tokE"):
        Image.new("RGB", (4, 4)).save(report / f"{name}.png")
    return report


def test_numbers_are_the_reports(folder, tmp_path) -> None:
    text = write_card(CardRecipe(report=folder, out=tmp_path / "model")).read_text()
    for said in (
        "tokenizer (9.0M parameters) and prior (6.5M) for pictures of 32×32: 64 codes",
        "4,096-entry codebook in 8 groups, 8 denoising steps, 391 labels",
        "The runs below took 120 minutes on 2 threads on 2 cores of A Processor.",
        "7,397 emoji in four styles",
        "(193 emoji, 763 pictures)",
        "    dar train tokenizer --preset demo --minutes 60\n\n- tokenizer: 5,000 steps, 100 min",
        ", in 2 calls that resumed one another",
        "- prior: 900 steps, 20 minutes\n",
        "Muon on the hidden matrices, a loss on the solver's own states, weight 2.",
        "| reconstruction | 20.2 dB (19.2) |",
        "| by style: noto, twemoji | 20.0, 20.5 dB |",
        "| estimate from 1, 8 groups | 17.5, 20.2 dB |",
        "| 64 unquantised principal components | 19.5 dB (18.5) |",
        "| their perplexity | 2,700 |",
        "| prior, cross-entropy a code | 3.00 nats |",
        "has 17.5 dB; all groups change that by +2.8 dB.",
        "A small classifier, 700 steps of training on the same split, judged 384 samples",
        "| samples, for what was asked | 50 % | 30 % | 20 % |",
        "chance is 25 % for the style",
    ):
        assert said in text, said
    assert "before" not in text
    for name in ("samples.png", "curves-tokenizer.png"):
        assert f"]({name})" in text
        assert (tmp_path / "model" / name).is_file()
    assert "reconstructions.png" not in text  # the report has no such picture
    assert json.loads((tmp_path / "model" / "report.json").read_text()) == REPORT


def test_beside_an_older_report(folder, tmp_path) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("Two calls ran on another machine.\n")
    out = tmp_path / "model"
    out.mkdir()
    (out / "report.json").write_bytes(OLDER.read_bytes())  # is read before it is written over
    line = f"card --report {folder} --out {out} --before {out}/report.json --notes {notes}"
    assert cli.main(line.split()) == 0
    text = (out / "README.md").read_text()
    older = json.loads(OLDER.read_text())
    psnr = older["tokenizer"]["psnr"], older["tokenizer"]["psnr_of_mean"]
    assert f"| reconstruction | 20.2 dB (19.2) | {psnr[0]:.1f} dB ({psnr[1]:.1f}) |" in text
    entropy = older["prior"]["cross_entropy"]
    assert f"| prior, cross-entropy a code | 3.00 nats | {entropy:.2f} nats |" in text
    both = 100 * older["classifier"]["samples"]["both"]
    assert f"| 20 % (before {both:.0f} %) |" in text
    assert "Two calls ran on another machine." in text
    assert json.loads((out / "report.json").read_text()) == REPORT


@pytest.mark.parametrize("same", [True, False])
def test_an_older_model_by_the_same_judge_or_another(folder, tmp_path, same) -> None:
    older = copy.deepcopy(REPORT)
    older["classifier"]["samples"]["style"] = 0.4
    if not same:
        older["classifier"]["held_out"]["both"] = 0.1
    (tmp_path / "older.json").write_text(json.dumps(older))
    recipe = CardRecipe(report=folder, out=tmp_path / "model", before=tmp_path / "older.json")
    text = write_card(recipe).read_text()
    assert "| samples, for what was asked | 50 % (before 40 %) | 30 % (before 30 %) |" in text
    assert ("| real held-out pictures | 50 % | 30 % | 20 % |" in text) is same
    judge = "the same judge's" if same else "that report's own judge's"
    assert f"The figures before are {judge}." in text


def test_less_is_said_of_a_report_with_less(folder, tmp_path) -> None:
    report = copy.deepcopy(REPORT)
    for key in ("classifier", "baselines", "runs", "machine"):
        del report[key]
    report["pictures"]["styles"] = [""]
    (folder / "report.json").write_text(json.dumps(report))
    text = write_card(CardRecipe(report=folder, out=tmp_path / "model")).read_text()
    assert "7,397 pictures, 763 of them held out of every training." in text
    assert "| the mean training picture | – |" in text
    for absent in ("judge", "minutes", "## Training\n\n## Training", "emoji in four styles"):
        assert absent not in text


def test_bad_reports(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="report: expected a report in"):
        write_card(CardRecipe(report=tmp_path / "none", out=tmp_path))
    with pytest.raises(ValueError, match="notes: expected a readable file"):
        write_card(CardRecipe(report=folder, out=tmp_path, notes=tmp_path / "none"))
    for content, message in (
        ("[]", "got another document"),
        ("{", "report: expected a report"),
        (json.dumps(REPORT | {"models": None}), "expected all that a card says"),
        (json.dumps({k: v for k, v in REPORT.items() if k != "models"}), "got an older report"),
    ):
        (folder / "report.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            write_card(CardRecipe(report=folder, out=tmp_path / "bad"))
    assert not (tmp_path / "bad" / "README.md").exists()


def test_runs_describe_themselves(tokenizer_recipe, tmp_path) -> None:
    recipe = tokenizer_recipe(seed=3)
    begin(recipe, CPU)
    begin(recipe, CPU._replace(rank=1, world=2))  # only the first rank writes
    (recipe.out / "metrics.jsonl").write_text(
        '{"kind": "train", "step": 4, "minutes": 0.5}\n{"kind": "held_out", "step": 6}\n{"torn'
    )
    run = describe_run(recipe.out)
    assert (run["step"], run["minutes"], run["recipe"]["seed"]) == (6, 0.5, 3)
    (call,) = run["calls"]
    assert call["versions"]["torch"] == torch.__version__
    assert call["threads"] == torch.get_num_threads()
    assert str(tmp_path) not in call["command"]
    assert describe_run(tmp_path / "none") == {"name": "none", "kind": "none"}
    (recipe.out / "metrics.jsonl").write_text('{\n{"step": 1}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: expected JSON in line 1"):
        describe_run(recipe.out)


def test_commands_say_what_a_preset_does_not() -> None:
    assert command_of(PRIOR_DEMO) == "dar train prior --preset demo"
    changed = replace(
        TOKENIZER_DEMO, minutes=5.0, augment=False, call_minutes=3.0,
        data=Path("/far/away/emoji-32.npz"), override=("dit.depth=3", "num_steps=4"),
    )  # fmt: skip
    assert command_of(changed) == (
        "dar train tokenizer --preset demo --minutes 5.0 --override dit.depth=3 num_steps=4 "
        "--no-augment"
    )
