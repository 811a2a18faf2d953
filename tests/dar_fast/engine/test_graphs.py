"""The recorded stand-in for CUDA graphs: it replays what a graph would, and refuses the rest."""

import pytest
import torch
from torch import Tensor

from dar_fast.engine.graphs import (
    CudaCapture,
    GraphCache,
    NoCapture,
    Replay,
    TapeCapture,
    buckets,
    capture_for,
)
from dar_fast.engine.tape import HostReadError
from dar_kernels import guided_sample
from dar_kernels.dispatch import UnavailableError
from dar_kernels.pages import new_pages
from dar_kernels.qkv_rope_append import qkv_rope_append


class Work:
    """y = 2 (x + 1), of a static buffer `x`."""

    def __init__(self) -> None:
        self.x = torch.zeros(3)
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return (self.x.view(3, 1) + 1).squeeze(1) * 2


def test_a_replay_reads_the_buffers_again_and_runs_no_python() -> None:
    work = Work()
    replay = TapeCapture().capture(work)
    work.x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    first = replay.run()
    assert first.tolist() == [4, 6, 8]
    work.x.fill_(9)
    assert replay.run() is first  # overwritten
    assert first.tolist() == [20, 20, 20]
    assert work.calls == 1
    assert replay.launches == 2  # the views launch nothing


@pytest.mark.parametrize(
    ("capture", "right"), [(TapeCapture(), False), (NoCapture(), True)], ids=["tape", "none"]
)
def test_a_tensor_that_is_not_a_static_buffer_shows(
    capture: TapeCapture | NoCapture, right: bool
) -> None:
    work = Work()
    replay = capture.capture(work)
    replay.run()
    work.x = torch.ones(3)  # the mistake: a new tensor, where the old one should have been filled
    assert torch.equal(replay.run(), torch.full((3,), 4.0)) is right


def test_a_number_of_the_host_stays_what_it_was() -> None:
    x, step = torch.zeros(2), [1]
    replay = TapeCapture().capture(lambda: x + step[0])
    step[0] = 5
    assert replay.run().tolist() == [1, 1]


def test_in_place_work_and_its_order_are_kept() -> None:
    state, x = torch.zeros(4), torch.tensor([1.0, 2.0])

    def work() -> Tensor:
        state[:2] = x
        state[2:].copy_(state[:2]).mul_(3)
        return state.sum()

    replay = TapeCapture().capture(work)
    x.fill_(7)
    assert replay.run().item() == 56
    assert state.tolist() == [7, 7, 21, 21]


def test_ops_of_the_library_are_one_launch_each() -> None:
    logits, seeds = torch.randn(2, 8), torch.tensor([3, 4])
    positions = torch.zeros(2, dtype=torch.int64)

    def work() -> Tensor:
        return guided_sample(logits, None, seeds, positions, guidance_scale=1.0)

    replay = TapeCapture().capture(work)
    assert replay.launches == 1
    logits.copy_(torch.eye(8)[[6, 2]] * 100)
    assert replay.run().tolist() == [6, 2]


def test_ops_that_write_pages_are_replayed_into_them() -> None:
    pages = new_pages(3, 1, 4, dtype=torch.float32, device="cpu")
    table, where = torch.tensor([[0], [2]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    qkv, angles = torch.ones(2, 12), torch.zeros(32, 2)

    def work() -> Tensor:
        return qkv_rope_append(
            qkv, angles + 1, angles, where, pages, table, heads=1, kv_heads=1,
            implementation="torch",
        )  # fmt: skip

    replay = TapeCapture().capture(work)
    qkv.fill_(2)
    where.copy_(torch.tensor([5, -1]))  # the second row is idle now
    q = replay.run()
    assert q[:, 0].tolist() == [[2] * 4, [0] * 4]
    assert pages.keys[:, 0, [0, 5], 0].tolist() == [[1, 2], [0, 0], [1, 0]]


MASK = torch.tensor([True, False])
READS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if x.any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x + 1),
    "mask": lambda x: x[MASK],
    "masked write": lambda x: x.index_put_((MASK,), x),
    "masked select": lambda x: x.masked_select(MASK),
    "unique": lambda x: x.unique(),
    "host values": lambda x: x + torch.tensor([1.0, 2.0]),
    "to another device": lambda x: x.to("meta"),
    "from another device": lambda x: torch.empty(2, device="meta").copy_(x),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_graph_cannot_hold_raises(name: str) -> None:
    x = torch.tensor([1.0, 2.0])
    with pytest.raises(HostReadError, match=r"capture: (aten\.)?\w+.* (reads|copies|makes)"):
        TapeCapture().capture(lambda: READS[name](x))


def test_buckets_double_and_then_grow_by_a_reading_of_the_weights() -> None:
    assert buckets(1) == (1,)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(20) == (1, 2, 4, 8, 16, 20)
    assert buckets(64) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    with pytest.raises(ValueError, match="expected at least 1 request, got 0"):
        buckets(0)


def test_the_cache_captures_once_a_name_and_bucket() -> None:
    cache, work = GraphCache(TapeCapture(), 12), Work()
    assert [cache.bucket_for(n) for n in (1, 2, 3, 8, 9, 12)] == [1, 2, 4, 8, 12, 12]
    for count in (0, 13):
        with pytest.raises(ValueError, match=f"expected 1 to 12 requests, got {count}"):
            cache.bucket_for(count)
    for bucket in (4, 1, 4, 4):
        assert cache.run("work", bucket, work).tolist() == [2, 2, 2]
    assert [(r.name, r.bucket, r.launches, r.replays) for r in cache.report()] == [
        ("work", 4, 2, 3),
        ("work", 1, 2, 1),
    ]
    assert work.calls == 4  # warm-up and capture of each


def test_a_capture_that_failed_is_tried_again() -> None:
    cache, x, fails = GraphCache(TapeCapture(), 1), torch.ones(1), [True]

    def work() -> Tensor:
        if fails[0]:
            raise torch.OutOfMemoryError("no room")
        return x + 1

    with pytest.raises(torch.OutOfMemoryError):
        cache.run("work", 1, work)
    assert cache.report() == []
    fails[0] = False
    assert cache.run("work", 1, work).item() == 2


def test_capturing_on_a_device_without_graphs_is_an_error_and_the_default_none() -> None:
    with pytest.raises(UnavailableError, match="expected a CUDA device, got cpu"):
        CudaCapture(torch.device("cpu"))
    assert isinstance(capture_for(torch.device("cpu")), NoCapture)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_replay_into_one_pool() -> None:
    work, device = Work(), torch.device("cuda")
    work.x = work.x.to(device)
    cache = GraphCache(CudaCapture(device), 4)
    for value, bucket in ((1.0, 1), (2.0, 2), (3.0, 1)):
        work.x.fill_(value)
        assert cache.run("work", bucket, work).tolist() == [2 * value + 2] * 3
    assert work.calls == 4
    assert all(r.pool_bytes is not None for r in cache.report())
    broken: Replay[float] | None = None
    with pytest.raises(RuntimeError):
        broken = cache.capture.capture(lambda: float(work.x[0]))
    assert broken is None
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
