"""Memory: the plan comes first and stands beside what a run in a process of its own took."""

from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from dar_fast.bench import memory
from dar_fast.bench.memory import Measured
from dar_fast.bench.models import Spec
from dar_fast.bench.report import memory_lines
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.engine.plan import plan_memory

L = Spec(prior="L", tokenizer="v1", device="cpu")
DEMO = Spec(device="cpu")
HUGE = 10**18


DEFAULT = {"quantised": ["int8"], "batches": [1, 4], "tried": [1], "budget": None, "plan_for": None}


def measure(spec, **changes):
    return memory.memory(spec, **DEFAULT | changes, say=lambda _: None)


@pytest.fixture
def ran(monkeypatch):
    """Runs that are asked for, each of which takes 7 bytes."""
    runs = []

    def run(spec, weights, batch):
        runs.append((weights, batch))
        return Measured(3, 7)

    monkeypatch.setattr(memory, "_in_a_process", run)
    return runs


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_are_plans(ran, device):
    document = measure(L, plan_for=device, tried=[])
    for row in document["rows"]:
        plan = plan_memory(
            PRIORS["L"], TOKENIZERS["v1"], max_requests=row["batch"], dtype=torch.bfloat16,
            weights_dtype="int8" if row["weights"] == "int8" else "as given", device_type=device,
        )  # fmt: skip
        assert row["planned_bytes"] == plan.total == sum(row["parts"].values())
        assert row["measured_bytes"] is None
    assert [(r["weights"], r["batch"]) for r in document["rows"]] == [
        ("bf16", 1), ("bf16", 4), ("int8", 1), ("int8", 4),
    ]  # fmt: skip
    assert not ran


def test_the_largest_batch_is_the_last_that_fits(ran):
    budget = 80 * 10**9
    document = measure(L, plan_for="cuda", budget=budget)
    for kind, batch in document["largest_batch"].items():
        form = "as given" if kind == "bf16" else kind
        settings = {"dtype": torch.bfloat16, "weights_dtype": form}
        fits, not_ = (
            plan_memory(PRIORS["L"], TOKENIZERS["v1"], max_requests=b, **settings).total
            for b in (batch, batch + 1)
        )
        assert fits <= budget < not_
    assert not ran and all("another device" in r["why_not"] for r in document["rows"][::2])


def test_only_what_fits_and_was_asked_for_is_run(ran):
    document = measure(DEMO, batches=[1, 2, HUGE], tried=[1, HUGE])
    assert ran == [("fp32", 1), ("int8", 1)]
    one, two, huge = document["rows"][:3]
    assert (one["measured_bytes"], one["measured_loaded_bytes"]) == (7, 3)
    assert two["measured_bytes"] is None and "why_not" not in two
    assert "GB are free" in huge["why_not"]
    text = "\n".join(memory_lines(document))
    assert "batch   1 | fp32 | plan" in text and "not run" in text and "% of the plan" in text


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (BrokenProcessPool("gone"), "its process was killed: out of memory"),
        (MemoryError("no room"), "MemoryError: no room"),
        (RuntimeError("DefaultCPUAllocator: can't allocate"), "RuntimeError: Default"),
    ],
    ids=["killed", "MemoryError", "RuntimeError"],
)
def test_a_run_that_fails_says_why(monkeypatch, error, text):
    def fail(*_):
        raise error

    monkeypatch.setattr(memory, "_in_a_process", fail)
    for row in measure(DEMO)["rows"][::2]:
        assert row["measured_bytes"] is None and row["why_not"].startswith(text)


def test_a_real_run_takes_the_model_and_more():
    document = measure(DEMO, quantised=[], batches=[2], tried=[2])
    (row,) = document["rows"]
    assert row["measured_bytes"] is not None, row
    assert 0.8 * row["planned_loaded_bytes"] < row["measured_loaded_bytes"]
    assert row["measured_loaded_bytes"] < row["measured_bytes"]
    assert row["measured_bytes"] < row["planned_bytes"] + 200e6
