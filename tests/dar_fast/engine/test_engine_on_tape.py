"""A whole engine whose lanes replay recorded work, as CUDA graphs would: no GPU needed."""

import pytest
import torch
from engine_helpers import LONG, check_result, plain

from dar_fast import DARPipeline
from dar_fast.engine import Engine, EngineConfig, GenerationRequest
from dar_fast.engine.graphs import TapeCapture
from dar_fast.engine.launcher import GraphLauncher
from dar_fast.sampling import Sampling
from dar_kernels import prefer


@pytest.fixture
def on_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines capture on tape whatever their device."""
    monkeypatch.setattr("dar_fast.engine.runners.capture_of", lambda *_: TapeCapture())


REQUESTS = [
    GenerationRequest(label=1, seed=3),
    GenerationRequest(label=0, seed=4, sampling=Sampling(guidance_scale=1.0), num_steps=8),
    GenerationRequest(label=5, seed=5, sampling=Sampling(guidance_scale=(1.1, 6.0)), num_groups=3),
    GenerationRequest(label=2, seed=6, num_steps=2, solver="euler", prefix_codes=[7, 8, 9, 1, 2]),
    GenerationRequest(label=4, seed=7, sampling=Sampling(top_k=9, temperature=0.7), output="codes"),
    GenerationRequest(label=3, seed=8, sampling=Sampling(temperature=0.0)),
]


@pytest.mark.parametrize("deterministic", [False, True], ids=["batches", "deterministic"])
def test_captured_lanes_draw_what_the_plain_path_draws(
    tiny_pipeline: DARPipeline, on_tape: None, deterministic: bool
) -> None:
    config = EngineConfig(max_requests=4, threads=1, deterministic=deterministic)
    with (
        prefer("torch"),
        Engine(tiny_pipeline.prior, tiny_pipeline.tokenizer, config) as engine,
    ):
        handles = [engine.submit(request) for request in REQUESTS]
        for request, handle in zip(REQUESTS, handles, strict=True):
            check_result(handle.result(LONG), plain(tiny_pipeline, request))
        stats, graphs = engine.stats(), engine.graphs()
    assert {graph.name.split()[0] for graph in graphs} == {
        "tokens", "extend", "conditions", "step",
    }  # fmt: skip
    assert all(graph.launches and graph.replays for graph in graphs)
    assert stats.decode_step == "torch"
    assert stats.retries == 0, "a step could not be recorded"


def test_the_first_launch_of_a_kind_takes_one_step_alone() -> None:
    """Warming up and capturing must not touch the slots of requests."""
    state = torch.zeros(4)

    def work(slots: torch.Tensor, by: torch.Tensor) -> None:
        state.index_put_((slots,), state[slots] + by)

    launch = GraphLauncher(TapeCapture(), 2, padding=3)
    for slot, by in ((0, 1.0), (1, 2.0), (0, 5.0)):
        launch(("add", 1), work, (torch.tensor([slot]), torch.tensor([by])))
    assert state[:3].tolist() == [6.0, 2.0, 0.0]
    assert [(r.name, r.bucket, r.replays) for r in launch.report()] == [("add", 1, 4)]
    assert launch.size(2) == 2


def test_a_launch_that_fails_can_be_made_again() -> None:
    state, broken = torch.zeros(2), [True]

    def work(slots: torch.Tensor) -> None:
        if broken:
            raise RuntimeError("out of memory")
        state.index_put_((slots,), state[slots] + 1)

    launch = GraphLauncher(TapeCapture(), 1, padding=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        launch(("add", 1), work, (torch.tensor([0]),))
    broken.clear()
    launch(("add", 1), work, (torch.tensor([0]),))
    assert state[0] == 1
