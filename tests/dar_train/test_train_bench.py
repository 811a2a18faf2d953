"""dar bench train: FLOPs, both subjects, memory by part, failures, the document and the command."""

import json
from dataclasses import replace

import pytest
import torch

from dar_fast.cli import main
from dar_fast.config import PRIORS, TOKENIZERS
from dar_train.bench import measure as module
from dar_train.bench.flops import prior_flops, tokenizer_flops
from dar_train.bench.measure import lines_of, measure
from dar_train.bench.subjects import Setting, plain, trained
from dar_train.bench.worker import Worker, WorkerError, memory_of

DEMO = Setting(
    model="prior", preset="demo", device="cpu", batch=3, micro_batch=2, compile=False,
    attention=None, recompute="none", threads=1,
)  # fmt: skip
LITTLE = replace(DEMO, model="tokenizer", batch=2, micro_batch=1)


@pytest.mark.parametrize(("name", "tera"), [("L", 0.51), ("XL", 1.17)])
def test_flops_of_the_prior_are_the_reference_s(name, tera) -> None:
    assert prior_flops(PRIORS[name]) / 1e12 == pytest.approx(tera, abs=0.005)


def test_flops_of_the_tokenizer_are_those_of_its_parts() -> None:
    """The pixel DiT of v1 takes 332 GFLOP forward; the rest is a fifth of that."""
    assert tokenizer_flops(TOKENIZERS["v1"]) / 3 == pytest.approx(1.2 * 332e9, rel=0.02)


@pytest.mark.parametrize("setting", [DEMO, LITTLE], ids=["prior", "tokenizer"])
@pytest.mark.parametrize("make", [trained, plain], ids=["ours", "plain"])
def test_a_step_trains(setting, make) -> None:
    with make(setting) as subject:
        before = [p.detach().clone() for p in subject.model.parameters()]
        subject.step()
        subject.step()
        after = list(subject.model.parameters())
        moved = [
            not torch.equal(a, b) for a, b in zip(before, after, strict=True) if b.requires_grad
        ]
        assert sum(moved) > 0.9 * len(moved)
        assert all(p.isfinite().all() for p in after)
        memory = memory_of(subject, 10**9)
    count = sum(p.numel() for p in after)
    assert memory.weights == 4 * count
    assert 1.9 * memory.weights * 0.5 <= memory.optimizer <= 2.1 * memory.weights
    assert memory.average in (0, memory.weights)


def test_both_hold_the_same_model() -> None:
    with trained(DEMO) as ours, plain(DEMO) as theirs:
        mine, other = ours.model.state_dict(), theirs.model.state_dict()
        assert mine.keys() == other.keys()
        assert all(mine[name].shape == other[name].shape for name in mine)


@pytest.mark.slow
def test_the_document(monkeypatch) -> None:
    monkeypatch.setattr(module, "WARM", 1)
    said: list[str] = []
    document = measure(DEMO, turns=1, budget=60, say=said.append)
    assert json.loads(json.dumps(document)) == document
    for key in ("images_per_second", "plain_images_per_second", "ratio", "mfu", "peak_bytes"):
        assert document[key] > 0
    took = document["seconds"]
    assert document["ratio"] == pytest.approx(took["plain"][0] / took["ours"][0], rel=1e-3)
    assert document["images_per_second"] == pytest.approx(3 / took["ours"][0], rel=1e-3)
    parts = document["seconds_by_part"]
    assert {"data", "forward", "backward", "clip", "optimizer", "average"} <= parts.keys()
    assert document["peak_bytes"] > document["memory"]["ours"]["weights"]
    assert any("images a second" in line for line in lines_of(document))


@pytest.mark.slow
def test_a_plain_loop_that_fails_leaves_its_cells_empty(monkeypatch) -> None:
    real = module.Worker

    def worker(kind, setting):
        return real(kind, replace(setting, preset="nothing") if kind == "plain" else setting)

    monkeypatch.setattr(module, "Worker", worker)
    monkeypatch.setattr(module, "WARM", 1)
    document = measure(DEMO, turns=1, budget=60, say=lambda line: None)
    assert document["plain_images_per_second"] is None
    assert document["ratio"] is None
    assert "plain: KeyError" in document["failed"]["plain"]
    assert any("not measured" in line for line in lines_of(document))


def test_a_subject_that_dies_is_reported() -> None:
    with Worker("ours", DEMO) as worker:
        worker._process.kill()
        with pytest.raises(WorkerError, match="ours: its process ended"):
            worker.ask("step")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "prior, tokenizer: expected one of them"),
        ("--prior B --tokenizer lite", "prior, tokenizer: expected one of them"),
        ("--prior Q", "prior: expected one of"),
        ("--prior B --batch 4 --micro-batch 8", "micro-batch: expected 1 to the batch of 4"),
        ("--prior B --attention nothing", "attention: expected"),
        ("--prior B --out figures.txt", "out: expected"),
    ],
)
def test_bad_usage(line, message, capsys) -> None:
    assert main(["bench", "train", *line.split()]) == 2
    assert message in capsys.readouterr().err
