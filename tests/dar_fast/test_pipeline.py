"""The front door against its parts: calls, streams, early stops, prefixes, seeds, callbacks."""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dar_fast import DARPipeline
from dar_fast.flow import SOLVERS
from dar_fast.images import to_pil, to_unit
from dar_kernels import prefer

Q, K, N, S = 4, 4, 16, 4  # of the tiny pipeline
LABELS, SEEDS = [2, 0, 5], [11, 7, 2**63 - 1]
TOLERANCE = 2e-5  # group by group against the whole sequence, pictures in [0, 1]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


class Work(NamedTuple):
    groups: int  # drawn, of all pictures
    steps: int  # taken, of all pictures


@contextmanager
def counted(pipe: DARPipeline) -> Iterator[list[Work]]:
    """Holds, at the end, what the engine did within."""
    before, done = pipe.engine.stats(), []
    yield done
    after = pipe.engine.stats()
    done.append(Work(after.groups - before.groups, after.steps - before.steps))


class Gate:
    """Lets the engine draw a group only when it is told to."""

    def __init__(self, pipe: DARPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open = threading.Semaphore(0)
        runner = pipe.engine._machine.lanes[0].runner  # type: ignore[attr-defined]
        run = runner.run

        def wait(rows: Any) -> Tensor:
            assert self._open.acquire(timeout=60)
            return run(rows)

        monkeypatch.setattr(runner, "run", wait)

    def let(self, groups: int) -> None:
        self._open.release(groups)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 4, 8, 12, 16])
def test_a_call_is_generate_then_decode(
    tiny_pipeline: DARPipeline, steps: int | None, solver: Any
) -> None:
    settings = {"guidance_scale": (1.1, 5.0), "temperature": 0.9, "top_k": 40, "top_p": 0.95}
    with counted(tiny_pipeline) as work:
        out = tiny_pipeline(
            LABELS, seeds=SEEDS, num_inference_steps=steps, solver=solver, output_type="pt",
            **settings,
        )  # fmt: skip
    assert work == [(3 * K, 3 * (steps or S))]
    codes = tiny_pipeline.prior.generate(torch.tensor(LABELS), seeds=SEEDS, **settings)
    assert torch.equal(out.codes, codes)
    whole = tiny_pipeline.tokenizer.decode(codes, seeds=SEEDS, num_steps=steps, solver=solver)
    close(out.images, to_unit(whole))
    assert out.images.std() > 0.1  # the weights do something
    assert out.seeds == SEEDS


@pytest.mark.parametrize("steps", [1, 4, 8, 12, 16])
def test_a_stream_is_a_call_in_order(tiny_pipeline: DARPipeline, steps: int) -> None:
    settings: dict[str, Any] = {"seeds": SEEDS, "num_inference_steps": steps, "output_type": "pt"}
    out = tiny_pipeline(LABELS, **settings)
    with counted(tiny_pipeline) as work:
        events = list(tiny_pipeline.stream(LABELS, **settings))
    assert work == [(3 * K, 3 * steps)]
    expected = [("preview", step, i) for step in range(1, steps + 1) for i in range(3)]
    expected += [("image", steps, i) for i in range(3)]
    assert [(e.kind, e.step, e.index) for e in events] == expected
    for event in events:
        assert event.seed == SEEDS[event.index]
        n = len(event.codes)
        assert torch.equal(event.codes, out.codes[event.index, :n])
        if event.kind == "image":
            assert n == N
            assert torch.equal(event.image, out.images[event.index])
        else:
            preview = tiny_pipeline.tokenizer.decode(
                out.codes, seeds=SEEDS, num_steps=steps, stop_after=event.step, preview="jump"
            )
            close(event.image, to_unit(preview)[event.index])


def test_previews_come_before_later_codes(
    fresh_pipeline: DARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(fresh_pipeline, monkeypatch)
    before = fresh_pipeline.engine.stats()
    stream = fresh_pipeline.stream([1], seeds=0)
    assert fresh_pipeline.engine.stats() == before
    for step in range(1, S + 1):
        gate.let(1)  # were a later group needed, the event would never come
        event = next(stream)
        assert (event.kind, event.step, len(event.codes)) == ("preview", step, step * Q)
    assert next(stream).kind == "image"


def test_a_stopped_stream_does_no_more_work(
    fresh_pipeline: DARPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = fresh_pipeline.engine, Gate(fresh_pipeline, monkeypatch)
    stream = fresh_pipeline.stream([1], seeds=0)
    gate.let(1)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    gate.let(K)
    engine.close(drain=True)
    done = engine.stats()
    assert (done.steps, done.cancelled, done.finished) == (1, 1, 0)
    assert done.groups <= 2  # one may have been under way


@pytest.mark.parametrize(
    ("steps", "groups", "stop"),
    [(4, 1, 1), (4, 3, 3), (8, 1, 1), (8, 2, 3), (8, 3, 5), (2, 1, 1), (2, 3, 2), (1, 2, 1)],
)
def test_an_early_stop_is_the_jump_estimate(
    tiny_pipeline: DARPipeline, steps: int, groups: int, stop: int
) -> None:
    settings: dict[str, Any] = {"seeds": SEEDS, "num_inference_steps": steps, "output_type": "pt"}
    whole = tiny_pipeline(LABELS, **settings)
    with counted(tiny_pipeline) as work:
        out = tiny_pipeline(LABELS, num_groups=groups, **settings)
    assert torch.equal(out.codes, whole.codes[:, : groups * Q])
    assert work == [(3 * groups, 3 * stop)]
    # what comes behind the groups must not matter
    padded = torch.cat((out.codes, torch.zeros(3, N - groups * Q, dtype=torch.int64)), 1)
    estimate = tiny_pipeline.tokenizer.decode(
        padded, seeds=SEEDS, num_steps=steps, stop_after=stop, preview="jump"
    )
    close(out.images, to_unit(estimate))
    last = list(tiny_pipeline.stream(LABELS, num_groups=groups, **settings))[-3:]
    assert [(e.kind, e.step, len(e.codes)) for e in last] == [("image", stop, groups * Q)] * 3
    assert torch.equal(torch.stack([e.image for e in last]), out.images)


def test_all_groups_are_no_early_stop(tiny_pipeline: DARPipeline) -> None:
    out = tiny_pipeline([1], seeds=3, output_type="pt")
    same = tiny_pipeline([1], seeds=3, num_groups=K, output_type="pt")
    assert torch.equal(out.images, same.images)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_is_alone(tiny_pipeline: DARPipeline, temperature: float) -> None:
    """Equal codes; the last bits of a matrix product may depend on the size of the batch."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(6, (9,), generator=generator)
    seeds = torch.randint(2**62, (9,), generator=generator)
    settings: dict[str, Any] = {"temperature": temperature, "output_type": "pt"}
    batch = tiny_pipeline(labels, seeds=seeds, **settings)
    for i in range(9):
        alone = tiny_pipeline(labels[i], seeds=[int(seeds[i])], **settings)
        assert torch.equal(alone.codes[0], batch.codes[i])
        close(alone.images[0], batch.images[i])
    order = [8, 3, 3, 0]
    moved = tiny_pipeline(labels[order], seeds=seeds[order], **settings)
    assert torch.equal(moved.codes, batch.codes[order])
    close(moved.images, batch.images[order])


def test_seeds_make_pictures(tiny_pipeline: DARPipeline) -> None:
    labels = ["noto/hotel"] * 3
    base = tiny_pipeline(labels, seeds=[4, 5, 6], output_type="pt")
    assert torch.equal(base.images, tiny_pipeline(labels, seeds=4, output_type="pt").images)
    assert len({tuple(row) for row in base.codes.tolist()}) == 3
    torch.manual_seed(9)
    drawn = tiny_pipeline(labels, output_type="pt")
    again = tiny_pipeline(labels, seeds=drawn.seeds, output_type="pt")
    assert torch.equal(drawn.images, again.images)
    assert len(set(drawn.seeds)) == 3
    # the noise is a function of the seed, whatever the codes
    prefix = base.codes[0]
    a, b = (tiny_pipeline([1], seeds=[s], prefix_codes=prefix, output_type="pt") for s in (1, 2))
    assert torch.equal(a.codes, b.codes)
    assert not torch.allclose(a.images, b.images, atol=1e-2)


def test_the_global_generator_is_left_alone(tiny_pipeline: DARPipeline) -> None:
    before = torch.get_rng_state()
    tiny_pipeline([1, 2], seeds=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_gradients_and_grad_mode_untouched(tiny_pipeline: DARPipeline) -> None:
    stream = tiny_pipeline.stream([0], seeds=0, output_type="pt")
    assert not next(stream).image.requires_grad  # type: ignore[union-attr]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("length", [0, 1, 4, 7, 16])
def test_prefix(tiny_pipeline: DARPipeline, length: int) -> None:
    source = tiny_pipeline([3], seeds=1, output_type="codes").codes[0, :length]
    rows = source.expand(2, -1)
    outs = [
        tiny_pipeline([0, 1], seeds=8, prefix_codes=prefix, output_type="pt")
        for prefix in (source, source[None], rows)
    ]
    for out in outs:
        assert torch.equal(out.codes[:, :length], rows)
        assert torch.equal(out.codes, outs[0].codes)
        assert torch.equal(out.images, outs[0].images)
    labels = torch.tensor([0, 1])
    codes = tiny_pipeline.prior.generate(labels, seeds=8, prefix_codes=rows)
    assert torch.equal(outs[0].codes, codes)


def test_prefix_and_early_stop(tiny_pipeline: DARPipeline) -> None:
    codes = tiny_pipeline([3], seeds=1, output_type="codes").codes
    out = tiny_pipeline([3], seeds=1, prefix_codes=codes, num_groups=2, output_type="pt")
    early = tiny_pipeline([3], seeds=1, num_groups=2, output_type="pt")
    assert torch.equal(out.codes, early.codes)
    assert torch.equal(out.images, early.images)


def test_output_types(tiny_pipeline: DARPipeline) -> None:
    outs = {kind: tiny_pipeline([0, 4], seeds=2, output_type=kind) for kind in ("pil", "np", "pt")}
    codes = outs["pt"].codes
    decoded = tiny_pipeline.tokenizer.decode(codes, seeds=2)
    pt, array, pil = outs["pt"].images, outs["np"].images, outs["pil"].images
    assert pt.dtype == torch.float32
    assert pt.shape == (2, 3, 16, 16)
    assert 0 <= pt.min() <= pt.max() <= 1
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in pil)
    difference = np.abs(np.array(pil[1], dtype=int) - np.array(to_pil(decoded)[1], dtype=int))
    assert difference.max() <= 1
    np.testing.assert_array_equal(np.array(pil[1]), (array[1] * 255).round().astype(np.uint8))


def test_codes_take_no_network_evaluation(tiny_pipeline: DARPipeline) -> None:
    with counted(tiny_pipeline) as work:
        out = tiny_pipeline([0, 4], seeds=2, output_type="codes")
        events = list(tiny_pipeline.stream([0, 4], seeds=2, output_type="codes"))
    assert work == [(2 * 2 * K, 0)]
    assert out.images is None
    assert torch.equal(out.codes, tiny_pipeline([0, 4], seeds=2).codes)
    assert [len(e.image) for e in events] == [4, 4, 8, 8, 12, 12, 16, 16, 16, 16]
    assert torch.equal(events[-1].image, out.codes[1])


def test_callback(tiny_pipeline: DARPipeline) -> None:
    seen: list[tuple[int, float]] = []
    previews: list[Tensor] = []
    latents: list[Tensor] = []

    def look(pipe: DARPipeline, step: int, t: float, values: dict[str, Any]) -> dict[str, Any]:
        assert pipe is tiny_pipeline
        assert values["codes"].shape == (2, (step + 1) * Q)
        seen.append((step, t))
        previews.append(values["preview"])
        latents.append(values["latents"])
        return values

    out = tiny_pipeline([0, 1], seeds=0, output_type="pt", callback_on_step_end=look)
    times = tiny_pipeline.tokenizer.trajectory(torch.zeros(2, 3, 16, 16)).times
    assert seen == list(enumerate(times[:-1]))
    close(out.images, tiny_pipeline([0, 1], seeds=0, output_type="pt").images)
    events = list(tiny_pipeline.stream([0, 1], seeds=0, output_type="pt"))
    close(to_unit(previews[2])[1], events[5].image)
    data_std = tiny_pipeline.tokenizer.config.dit.data_std
    assert torch.equal(to_unit(latents[-1] / data_std), out.images)
    assert not torch.equal(latents[0], latents[1])  # not one state that goes on changing


def test_callback_changes_latents(tiny_pipeline: DARPipeline) -> None:
    def blank(pipe: DARPipeline, step: int, t: float, values: dict[str, Any]) -> Any:
        return {"latents": torch.zeros_like(values["latents"])} if step == S - 1 else None

    out = tiny_pipeline([0], seeds=0, output_type="pt", callback_on_step_end=blank)
    assert torch.equal(out.images, torch.full((1, 3, 16, 16), 0.5))


@pytest.mark.parametrize(
    ("answer", "kind"), [(3, TypeError), ({"latents": torch.zeros(1)}, ValueError)]
)
def test_callback_answers_are_checked(
    tiny_pipeline: DARPipeline, answer: Any, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="callback_on_step_end: expected"):
        tiny_pipeline([0], seeds=0, callback_on_step_end=lambda *_: answer)


def test_callback_errors_propagate(tiny_pipeline: DARPipeline) -> None:
    class EnoughError(Exception):
        pass

    seen: list[int] = []

    def stop(pipe: DARPipeline, step: int, t: float, values: dict[str, Any]) -> None:
        seen.append(step)
        if step == 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        tiny_pipeline([0], seeds=0, callback_on_step_end=stop)
    assert seen == [0, 1]


def test_evaluation_mode(fresh_pipeline: DARPipeline) -> None:
    pipe = DARPipeline(fresh_pipeline.prior.train(), fresh_pipeline.tokenizer.train())
    assert not pipe.prior.training
    assert not pipe.tokenizer.training
    assert pipe.labels == {}


def test_bf16(fresh_pipeline: DARPipeline) -> None:
    full = fresh_pipeline([0, 1], seeds=0, output_type="pt")
    half = fresh_pipeline.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    prefix = {"prefix_codes": full.codes}
    out = half([0, 1], seeds=0, output_type="pt", **prefix)
    assert out.images.dtype == torch.float32
    assert (out.images - full.images).abs().mean() < 0.05


def test_a_copy_has_an_engine_of_its_own(fresh_pipeline: DARPipeline) -> None:
    before = fresh_pipeline([1], seeds=5, output_type="pt")
    twin = copy.deepcopy(fresh_pipeline)
    assert twin.engine is not fresh_pipeline.engine
    assert torch.equal(twin([1], seeds=5, output_type="pt").codes, before.codes)


def test_close_frees_the_engine_and_the_next_call_makes_one(fresh_pipeline: DARPipeline) -> None:
    before = fresh_pipeline([1], seeds=5, output_type="pt")
    engine = fresh_pipeline.engine
    fresh_pipeline.close()
    assert engine.closed
    fresh_pipeline.close()
    assert torch.equal(fresh_pipeline([1], seeds=5, output_type="pt").codes, before.codes)
    assert fresh_pipeline.engine is not engine


def test_moved_weights_get_a_new_engine(fresh_pipeline: DARPipeline) -> None:
    engine = fresh_pipeline.engine
    assert fresh_pipeline.engine is engine
    with prefer("torch"):
        assert fresh_pipeline.engine.stats().decode_step == "torch"
    fresh_pipeline.to(dtype=torch.bfloat16)
    assert fresh_pipeline.engine is not engine
    assert engine.closed


def test_fp8_products_survive_a_move(fresh_pipeline: DARPipeline) -> None:
    fresh_pipeline.to(dtype=torch.bfloat16)
    wide = fresh_pipeline([1], seeds=5, output_type="pt")
    pipe = DARPipeline(fresh_pipeline.prior, fresh_pipeline.tokenizer, dit_products="fp8")
    narrow = pipe.to("cpu")([1], seeds=5, output_type="pt")
    assert torch.equal(narrow.codes, wide.codes)
    assert 0 < (narrow.images - wide.images).square().mean().sqrt() < 0.05
