"""Groups drawn by captured steps: the codes of the plain path, whatever the batch; launches."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from token_mixes import Ask, N, Q, V, alone, make_prior, mixes, play, row
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dar_fast.config import PriorConfig
from dar_fast.engine.graph_tokens import GraphTokens
from dar_fast.engine.graphs import Capture, CudaCapture, NoCapture, TapeCapture
from dar_fast.engine.rows import TokenRow
from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights
from dar_fast.sampling import Sampling
from dar_kernels import triton_support

SLOTS, PAGES = 6, 24
CAPTURES = {"tape": TapeCapture, "none": NoCapture}


@pytest.fixture(scope="module")
def prior() -> Prior:
    return make_prior()


def new(prior: Prior, capture: Capture, **more: object) -> tuple[GraphTokens, Tensor]:
    codes = torch.full((SLOTS + 1, N), V - 1, device=prior.device)
    options = {"group_size": Q, "spare": SLOTS, "largest": SLOTS} | more
    return GraphTokens(prior, codes, PAGES, capture=capture, **options), codes  # type: ignore[arg-type]


def drawn(
    prior: Prior, mix: Sequence[Ask], capture: Capture, shuffle: int = 0, **more: object
) -> list[Tensor]:
    runner, codes = new(prior, capture, **more)
    return play(runner, codes, PAGES, mix, shuffle)


MIX = [
    Ask(label=1, seed=5, sampling=Sampling(guidance_scale=(1.1, 8.0), top_p=0.9)),
    Ask(label=0, seed=2**63 - 1, sampling=Sampling(guidance_scale=1.0, top_k=20), joins=1),
    Ask(label=5, seed=6, sampling=Sampling(guidance_scale=3.0, temperature=0.8), groups=3),
    Ask(label=1, seed=5, prefix=tuple(range(30)), joins=2),
    Ask(label=2, seed=0, sampling=Sampling(temperature=0), joins=2),
]


@pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES)
def test_requests_that_join_and_leave_draw_as_on_the_plain_path(
    prior: Prior, capture: Callable[[], Capture]
) -> None:
    for ask, codes in zip(MIX, drawn(prior, MIX, capture()), strict=True):
        assert torch.equal(codes, alone(prior, ask))


@settings(max_examples=5)  # the plain path is slow
@given(mix=mixes)
def test_any_mix_draws_as_on_the_plain_path(prior: Prior, mix: list[Ask]) -> None:
    for ask, codes in zip(mix, drawn(prior, mix, TapeCapture(), len(mix)), strict=True):
        assert torch.equal(codes, alone(prior, ask))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_bucket_edges_and_idle_rows(prior: Prior, count: int) -> None:
    runner, codes = new(prior, TapeCapture())
    rows = [row(MIX[0], 0, slot, ([slot], [slot + 8])) for slot in range(count)]
    rows = [replace(r, seed=r.slot) for r in rows]
    first = runner.run(rows)
    for r, own in zip(rows, first, strict=True):
        assert torch.equal(own, alone(prior, replace(MIX[0], seed=r.seed, groups=1)))
    assert torch.equal(runner.run(rows[::-1]).flip(0), first)  # and does not change the first
    assert (codes[count:SLOTS] == V - 1).all()  # of nobody
    assert [(r.bucket, r.replays) for r in runner.report()] == [
        (next(b for b in (1, 2, 4, 6) if b >= count), 2)
    ]
    used = [page for r in rows for page in (*r.pages, *(r.null_pages or ()))]
    unused = [page for page in range(PAGES) if page not in used]
    assert not runner.pages.keys[:, unused].any()
    assert not runner.pages.values[:, unused].any()


@pytest.mark.parametrize("stored", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantised_weights_and_pages_draw_as_their_plain_ops(stored: torch.dtype) -> None:
    prior = make_prior(depth=1, kv_heads=1)
    weights = decoder_weights(prior).quantize(stored)
    options = {"weights": weights, "page_dtype": stored}
    runs = [drawn(prior, MIX, c(), **options) for c in (TapeCapture, NoCapture)]
    plain = [alone(prior, ask) for ask in MIX]
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
    same = sum(int((a == b).sum()) for a, b in zip(runs[0], plain, strict=True))
    first = sum(int(a[0] == b[0]) for a, b in zip(runs[0], plain, strict=True))
    assert first >= len(MIX) - 1  # before errors add up
    assert same < sum(map(len, plain))  # they are quantised


def test_a_copied_page_continues_as_its_original(prior: Prior) -> None:
    runner, codes = new(prior, TapeCapture())
    ask = replace(MIX[0], groups=2)
    runner.run([row(ask, 0, 0, ([3], [9]))])
    codes[4, :Q] = codes[0, :Q]
    runner.copy_pages([(3, 1), (9, 2)])
    both = runner.run([row(ask, 1, 0, ([3], [9])), row(ask, 1, 4, ([1], [2]))])
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0], alone(prior, ask)[Q:])


@pytest.mark.skipif(triton_support.missing() is not None, reason="needs Triton")
def test_tritons_ops_draw_the_same_codes_with_an_idle_row_beside() -> None:
    prior, labels = make_prior(num_tokens=4, depth=1), torch.tensor([3, 4])
    prior.to("cuda" if torch.cuda.is_available() else "cpu")
    codes = torch.zeros(8, 4, dtype=torch.int64, device=prior.device)
    runner = GraphTokens(
        prior, codes, 6, group_size=2, spare=7, largest=2, capture=NoCapture(),
        implementation="triton",
    )  # fmt: skip
    scales = (3.0, 1.0)
    for first in (0, 2):
        rows = [
            TokenRow(
                slot=5 - i,
                label=int(label),
                seed=i,
                position=first,
                guidance=(scales[i],) * 2,
                temperature=1.0,
                top_k=0,
                top_p=0.9,
                pages=(i,),
                null_pages=(i + 3,) if scales[i] > 1 else None,
            )
            for i, label in enumerate(labels)
        ]
        runner.run(rows)
    for i, scale in enumerate(scales):
        expected = prior.generation(
            labels[i : i + 1], Sampling(guidance_scale=scale, top_p=0.9), [i], None, 4, "torch"
        )
        assert torch.equal(codes[5 - i], next(expected)[0])


class Counting(TapeCapture):
    """Without the warm-up, which reads values to check them."""

    def warm_up(self, fn: Callable[[], object]) -> None:
        pass


@pytest.mark.skipif(triton_support.missing() is not None, reason="needs Triton")
@pytest.mark.parametrize(("depth", "dtype"), [(24, torch.bfloat16), (2, torch.float32)], ids=str)
def test_launches_a_token_are_six_a_layer_and_a_few(depth: int, dtype: torch.dtype) -> None:
    """Of prior L's depth and length in a small width; nothing is computed."""
    config = PriorConfig(dim=64, depth=depth, heads=1, vocab_size=V, num_tokens=256, num_classes=6)
    prior = Prior(config).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        codes = torch.zeros(3, 256, dtype=torch.int64)
        runner = GraphTokens(
            prior, codes, 32, group_size=4, spare=2, largest=2, capture=Counting(),
            implementation="triton",
        )  # fmt: skip
        assert runner.launches_per_token is None
        inputs = runner.static_inputs(2)
        runner.cache.run("tokens", 2, lambda: runner.group(inputs.fields))
    beside = 6 + (dtype != torch.float32)  # the logits in fp32
    assert runner.launches_per_token is not None
    assert runner.launches_per_token * 4 == 4 * (6 * depth + beside) + 15


GOOD = row(MIX[0], 0, 2, ([0], [1]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "expected at least 1, got none"),
        ([replace(GOOD, slot=SLOTS)], "expected no request in the spare slot 6"),
        ([replace(GOOD, guidance=(1.0,))], "expected groups of 12 codes, got 1"),
        ([replace(GOOD, slot=s) for s in range(SLOTS - 1)], "expected 1 to 4 requests, got 5"),
    ],
)
def test_rows_that_do_not_fit_are_refused(prior: Prior, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new(prior, NoCapture(), largest=4)[0].run(rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spare": 7}, r"spare: expected a row of codes in \[0, 7\), got 7"),
        ({"group_size": 7}, "group_size: expected a divisor of 48, got 7"),
        ({"largest": 0}, "expected at least 1 request, got 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    prior: Prior, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        new(prior, NoCapture(), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_graphs_draw_as_the_ops_do_one_by_one(dtype: torch.dtype) -> None:
    prior = make_prior().to("cuda", dtype)
    graphs = drawn(prior, MIX, CudaCapture(torch.device("cuda")))
    for captured, eager in zip(graphs, drawn(prior, MIX, NoCapture()), strict=True):
        assert torch.equal(captured, eager)
    alone_too = drawn(prior, [replace(MIX[0], joins=0)], CudaCapture(torch.device("cuda")))
    assert torch.equal(alone_too[0], graphs[0])
