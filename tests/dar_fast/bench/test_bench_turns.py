"""Turns: everything once a turn, ceilings in between, none begun that would outlast its time."""

import pytest
import torch

from dar_fast.bench import measure, turns
from dar_fast.bench.measure import Roofs
from dar_fast.bench.ours import Timing
from dar_fast.bench.turns import take_turns

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where `pass_` says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(turns.time, "perf_counter", lambda: self.now)

    def subject(self, *seconds):
        left = iter(seconds)

        def run():
            took = next(left)
            self.now += took
            return Timing(took, took / 2)

        return run


class NoRoofs:
    probes = 0

    def probe(self):
        self.probes += 1


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_all_take_turns_and_the_least_counts(clock):
    roofs, said = NoRoofs(), []
    subjects = {"a": clock.subject(3, 1, 2), "b": clock.subject(4, 6, 5)}
    took = take_turns(subjects, roofs, turns=3, budget=1e9, say=said.append)
    assert took["a"].seconds == 1 and took["b"].seconds == 4
    assert took["a"].first_preview == 0.5
    assert took["b"].all_seconds == [4, 6, 5]
    assert [line.split(": ")[1] for line in said] == ["a", "b"] * 3
    assert roofs.probes == 6


@pytest.mark.parametrize(
    ("budget", "done"), [(0, 1), (19.9, 1), (20, 2), (29, 2), (30, 3), (99, 3)]
)
def test_a_turn_that_would_outlast_the_budget_is_not_begun(clock, budget, done):
    subjects = {"a": clock.subject(*[10] * 3)}
    took = take_turns(subjects, NoRoofs(), turns=3, budget=budget, say=lambda _: None)
    assert len(took["a"].timings) == done


def test_roofs_keep_the_best_of_all_probes(monkeypatch):
    times = iter([2.0, 4.0, 1.0, 8.0])
    monkeypatch.setattr(measure, "seconds", lambda *_, **__: next(times))
    monkeypatch.setattr(measure, "SIDES", {"cpu": 16, "cuda": 16})
    roofs = Roofs(CPU, torch.float32, {"fp32": 2**22})
    roofs.probe()
    assert roofs.bandwidth == {"fp32": 2**22 / 2} and roofs.rate == 2 * 16**3 / 4
    roofs.probe()
    assert roofs.bandwidth == {"fp32": 2**22 / 1} and roofs.rate == 2 * 16**3 / 4


def test_roofs_read_so_many_bytes_as_the_weights_have(monkeypatch):
    read = []

    def fake(run, *_, **__):
        read.append(run())
        return 1.0

    monkeypatch.setattr(measure, "seconds", fake)
    monkeypatch.setattr(measure, "SIDES", {"cpu": 16, "cuda": 16})
    Roofs(CPU, torch.bfloat16, {"bf16": 2**23, "int8": 2**22, "tiny": 1}).probe()
    *sums, product = read
    assert [float(s) for s in sums] == [2**21, 2**20, 2**18]  # ones of four bytes
    assert product.shape == (16, 16) and product.dtype == torch.bfloat16


def test_roofs_of_this_machine_are_plausible():
    roofs = Roofs(CPU, torch.float32, {"fp32": 2**22})
    roofs.probe(repeats=1)
    assert 1e8 < roofs.bandwidth["fp32"] < 1e14
    assert 1e8 < roofs.rate < 1e15
