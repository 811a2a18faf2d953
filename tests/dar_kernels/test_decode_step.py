"""The native decode step against its definition in fp64, and against the prior of dar_fast."""

import dataclasses

import pytest
import torch
from decoders import (
    ODD,
    PLAIN,
    PRIOR_L,
    TINY_HEADS,
    WIDE_HEADS,
    Shape,
    clone,
    dequantized,
    make_pages,
    make_settings,
    make_weights,
    reference,
    widen,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import EPS, relative_error

from dar_fast.config import PriorConfig
from dar_fast.models import Prior
from dar_kernels import native
from dar_kernels.decode_step import NativeDecoder, decode_step_ref
from dar_kernels.decoder_weights import new_decoder_pages

ISAS = native.isa_supported()
needs_native = pytest.mark.skipif(not ISAS, reason="the C++ ops were not built")
pytestmark = needs_native
POSITIONS = (0, 5, 31, 32, 63, 70)  # first, within and at both ends of a page
INT8_ERROR = 1e-4  # of 16-bit activations, where torch in bf16 has 1e-2


def inputs(weights, rows, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, weights.norm.shape[0], generator=generator)


def stored(weights, kind):
    """The weights as they are, or in int8."""
    return weights.quantize(torch.int8) if kind == "int8" else weights


CASES = [
    (shape, kind, isa)
    for shape in (ODD, PLAIN, WIDE_HEADS, TINY_HEADS)
    for kind in ("fp32", "fp16", "bf16", "int8")
    for isa in ISAS
] + [(PRIOR_L, kind, isa) for kind in ("fp32", "bf16", "int8") for isa in ISAS[:1]]


@pytest.mark.parametrize(("shape", "kind", "isa"), CASES, ids=str)
def test_logits_and_pages_against_fp64(shape, kind, isa):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    page_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    weights = make_weights(shape, dtype)
    rows = len(POSITIONS)
    positions, x = torch.tensor(POSITIONS), inputs(weights, rows)
    pages, table = make_pages(weights, rows, page_dtype)
    decoder = NativeDecoder(stored(weights, kind), isa=isa)
    exact = dequantized(stored(weights, kind))
    truth, truth_pages = reference(exact, x, pages, table, positions, torch.float64)
    same, same_pages = reference(weights, x, pages, table, positions, dtype)
    ours_pages = clone(pages)
    logits = decoder.logits(x, ours_pages, table, positions, threads=1)
    bound = INT8_ERROR if kind == "int8" else 2 * relative_error(same, truth) + EPS
    assert relative_error(logits, truth) <= bound
    for before, ours, theirs, exact_page in zip(
        pages[:2], ours_pages[:2], same_pages[:2], truth_pages[:2], strict=True
    ):
        assert (before != ours).sum() <= rows * before[:, 0, :, 0].numel()  # the new tokens
        bound = INT8_ERROR if kind == "int8" else 2 * relative_error(theirs, exact_page) + EPS
        assert relative_error(ours, exact_page) <= bound


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_pages_of_fp32_weights(isa):
    weights = make_weights(ODD)
    pages, table = make_pages(weights, 3, torch.bfloat16)
    x, positions = inputs(weights, 3), torch.tensor([3, 40, 64])
    truth, truth_pages = reference(weights, x, pages, table, positions, torch.float64)
    logits = NativeDecoder(weights, isa=isa).logits(x, pages, table, positions)
    assert relative_error(logits, truth) < 1e-3
    for ours, exact in zip(pages[:2], truth_pages[:2], strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=5e-3)


def run(decoder, weights, x, pages, table, positions, options, n, guided, **more):
    B = len(positions)
    uncond = torch.arange(B, 2 * B) if guided else None
    return decoder.run(
        x, pages, table, positions, steps=n, uncond=uncond, **options._asdict(), **more
    )


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 10), n=st.integers(1, 5), guided=st.booleans(), seed=st.integers(0, 99),
    kind=st.sampled_from(["fp32", "bf16", "int8"]), isa=st.sampled_from(ISAS or ("none",)),
    threads=st.integers(1, 3), shape=st.sampled_from([ODD, PLAIN, TINY_HEADS]),
)  # fmt: skip
def test_a_batch_is_its_requests_one_by_one_and_step_by_step(
    B, n, guided, seed, kind, isa, threads, shape
):
    """Bitwise: any number of rows, threads and steps, any pages, alone or together."""
    weights = make_weights(shape, torch.bfloat16 if kind == "bf16" else torch.float32, seed)
    decoder = NativeDecoder(stored(weights, kind), isa=isa)
    R = 2 * B if guided else B
    pages, table = make_pages(weights, R, torch.float32, seed)
    options, x = make_settings(B, n, seed), inputs(weights, R, seed)
    positions = torch.arange(B) * 7 % 70
    together = run(
        decoder, weights, x, clone(pages), table, positions, options, n, guided, threads=threads
    )
    assert 0 <= together.min() <= together.max() < shape.V
    for b in {0, B // 2, B - 1}:
        rows = torch.tensor([b, B + b] if guided else [b])
        own, own_table = make_pages(weights, len(rows), torch.float32, seed + 1)
        for row, to in zip(table[rows], own_table, strict=True):
            for whole, part in zip(pages[:2], own[:2], strict=True):
                part[:, to.long()] = whole[:, row.long()]
        alone = x[rows]
        for i in range(n):
            at = options.rows(slice(b, b + 1)).steps(i, i + 1)
            code = run(
                decoder, weights, alone, own, own_table, positions[b : b + 1] + i, at, 1, guided,
                threads=1,
            )  # fmt: skip
            assert code.item() == together[b, i]
            alone = code[:, 0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_codes_are_drawn_from_the_logits(isa, guided):
    """Each is what `guided_sample` draws from the logits of the same step."""
    from dar_kernels import _native

    B, n = 5, 6
    weights = make_weights(ODD)
    decoder = NativeDecoder(weights, isa=isa)
    R = 2 * B if guided else B
    pages, table = make_pages(weights, R, torch.float32)
    options, x = make_settings(B, n, 3), inputs(weights, R)
    positions = torch.tensor([0, 10, 29, 31, 66])
    codes = run(decoder, weights, x, clone(pages), table, positions, options, n, guided)
    for i in range(n):
        every = (positions + i).repeat(R // B)
        logits = decoder.logits(x, pages, table, every)
        drawn = torch.empty(B, dtype=torch.int64)
        at = options.steps(i, i + 1)
        _native.guided_sample(
            logits[:B], logits[B:] if guided else torch.empty(0, 0), at.seeds, positions + i,
            at.guidance.flatten(), at.temperature, at.top_k, at.top_p, drawn, 1, isa,
        )  # fmt: skip
        assert torch.equal(drawn, codes[:, i])
        x = codes[:, i].repeat(R // B)


def test_forced_codes_are_followed():
    weights = make_weights(ODD)
    decoder = NativeDecoder(weights)
    B, n = 3, 8
    pages, table = make_pages(weights, 2 * B, torch.float32)
    options, x, positions = make_settings(B, n), inputs(weights, 2 * B), torch.tensor([0, 30, 5])
    free, forced = clone(pages), clone(pages)
    drawn = run(decoder, weights, x, free, table, positions, options, n, True)
    given = drawn.clone()
    given[:, 4:] = -1
    given[1, 2] = -1  # a step with one code to draw
    again = run(decoder, weights, x, forced, table, positions, options, n, True, forced=given)
    assert torch.equal(again, drawn)
    assert all(torch.equal(a, b) for a, b in zip(free[:2], forced[:2], strict=True))
    given = (drawn + 1) % ODD.V
    assert torch.equal(
        run(decoder, weights, x, forced, table, positions, options, n, True, forced=given), given
    )


def test_many_rows_pass_in_parts():
    """More rows than fit a second-level cache once prepared: 16 and more at a time."""
    shape = Shape(layers=1, D=64, heads=2, kv_heads=1, F=2000, V=20, N=40)
    weights = make_weights(shape)
    pages, table = make_pages(weights, 150, torch.float32)
    x, positions = inputs(weights, 150), torch.arange(150) % 40
    truth, _ = reference(weights, x, pages, table, positions, torch.float64)
    logits = NativeDecoder(weights).logits(x, pages, table, positions, threads=2)
    assert relative_error(logits, truth) < 1e-6


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_weights_that_are_not_finite_show(kind):
    weights = make_weights(ODD)
    decoder = NativeDecoder(stored(weights, kind))
    x = inputs(weights, 2)
    x[1, 3] = float("nan")
    pages, table = make_pages(weights, 2, torch.float32)
    logits = decoder.logits(x, pages, table, torch.tensor([4, 4]))
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reads_the_weights_in_place(dtype):
    weights = make_weights(ODD, dtype)
    decoder = NativeDecoder(weights)
    pages, table = make_pages(weights, 1, torch.float32)
    x, positions = inputs(weights, 1), torch.tensor([0])
    before = decoder.logits(x, pages, table, positions)
    weights.head.mul_(2)
    torch.testing.assert_close(decoder.logits(x, pages, table, positions), 2 * before)
    del weights  # the decoder keeps them
    torch.testing.assert_close(decoder.logits(x, pages, table, positions), 2 * before)


CONFIG = PriorConfig(
    dim=96, depth=2, heads=4, kv_heads=2, vocab_size=77, num_tokens=48, num_classes=5
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, (1.5, 4.0)], ids=str)
def test_equals_the_prior(dtype, scale):
    """Greedy codes wherever the margin decides, and logits, of dar_fast's module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = Prior(CONFIG)
        torch.nn.init.normal_(prior.head.weight, std=0.3)
    prior = prior.to(dtype).eval()
    from dar_fast.models.decoding import decoder_weights

    labels = torch.tensor([0, 3, 4])
    guided = scale != 1.0
    classes = torch.cat((labels, torch.full_like(labels, 5))) if guided else labels
    weights = decoder_weights(prior)
    pages, table = make_pages(weights, len(classes), dtype)
    with torch.no_grad():
        x = prior.class_embedding(classes).float()
    n = CONFIG.num_tokens
    first, last = (1.0, 1.0) if scale == 1.0 else scale
    options = make_settings(3, n)._replace(
        guidance=torch.linspace(first, last, n).expand(3, n).contiguous(),
        temperature=torch.zeros(3),
    )
    positions = torch.zeros(3, dtype=torch.int64)
    codes = run(NativeDecoder(weights), weights, x, pages, table, positions, options, n, guided)
    with torch.no_grad():
        wide = Prior(CONFIG).double().eval()
        wide.load_state_dict({k: v.double() for k, v in prior.state_dict().items()})
        embedded = wide.embed(codes.repeat(len(classes) // 3, 1), classes)[:, :-1]
        logits = wide.head(wide.hidden(embedded))
        if guided:
            cond, uncond = logits.chunk(2)
            logits = uncond + options.guidance[0].double()[:, None] * (cond - uncond)
    best = logits.topk(2, dim=-1)
    margin = 1e-4 if dtype == torch.float32 else 0.2
    decided = best.values[..., 0] - best.values[..., 1] > margin
    assert decided.float().mean() > 0.7
    assert torch.equal(codes[decided], best.indices[..., 0][decided])


def test_reference_is_the_prior():
    """`decode_step_ref` in fp64, fed its own greedy codes, against one pass of the module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior = Prior(dataclasses.replace(CONFIG, kv_heads=1)).double().eval()
        torch.nn.init.normal_(prior.head.weight, std=0.3)
    from dar_fast.models.decoding import decoder_weights

    weights = widen(decoder_weights(prior))
    labels, codes = torch.tensor([1, 2]), torch.randint(77, (2, 40))
    pages = new_decoder_pages(weights, 4, torch.float64)
    table = torch.tensor([[2, 0], [1, 3]])
    with torch.no_grad():
        expected = prior.head(prior.hidden(prior.embed(codes, labels)))
        x = prior.class_embedding(labels)
        for p in range(40):
            logits = decode_step_ref(weights, x, pages, table, torch.full((2,), p))
            torch.testing.assert_close(logits, expected[:, p])
            x = prior.token_embedding(codes[:, p])
