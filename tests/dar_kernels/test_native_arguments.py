"""What the C++ entry points do with wrong arguments: raise, and say what was expected."""

import pytest
import torch
from decoders import ODD, make_pages, make_settings, make_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_kernels import native
from dar_kernels.decode_step import NativeDecoder
from dar_kernels.decoder_weights import DecoderPages, new_decoder_pages
from dar_kernels.dispatch import UnavailableError
from dar_kernels.philox import code_bits, gumbel

ISAS = native.isa_supported()
pytestmark = pytest.mark.skipif(not ISAS, reason="the C++ ops were not built")
B, n = 2, 3


def call(**change):
    """`run` of two guided requests with some arguments changed."""
    weights = make_weights(ODD)
    pages, table = make_pages(weights, 2 * B, torch.float32)
    arguments = {
        "x": torch.ones(2 * B, ODD.D), "pages": pages, "block_table": table,
        "positions": torch.tensor([0, 40]), "steps": n, "uncond": torch.tensor([2, 3]),
    }  # fmt: skip
    arguments |= make_settings(B, n)._asdict() | change
    return NativeDecoder(weights).run(**arguments)


ints = torch.tensor
PAGES = (2, 9, 2, 32, 24)
WRONG = {
    "x-type": ({"x": [1.0]}, TypeError, "expected x a tensor, got list"),
    "x-dtype": ({"x": torch.ones(4, 96).half()}, TypeError, r"x float32 \[4, 96\].*got float16"),
    "x-shape": ({"x": torch.ones(4, 95)}, ValueError, r"contiguous, got float32 \[4, 95\]"),
    "x-strides": ({"x": torch.ones(96, 4).T}, ValueError, r"got float32 \[4, 96\] with strides"),
    "x-rows": ({"uncond": None}, ValueError, r"expected x float32 \[2, 96\]"),
    "x-rows-mixed": ({"uncond": ints([-1, 2])}, ValueError, r"expected x float32 \[3, 96\]"),
    "uncond-type": ({"uncond": True}, TypeError, "expected uncond a tensor, got bool"),
    "uncond-dtype": ({"uncond": ints([2, 3]).int()}, TypeError, r"uncond int64 \[2\].*got int32"),
    "uncond-shape": ({"uncond": ints([2, 3, 4])}, ValueError, r"uncond int64 \[2\]"),
    "uncond-conditional": (
        {"uncond": ints([1, 2])},
        ValueError, r"uncond -1 or in \[2, 4\) for 2 guided requests, got 1",
    ),
    "uncond-gap": (
        {"uncond": ints([-1, 3])},
        ValueError, r"uncond -1 or in \[2, 3\) for 1 guided requests, got 3",
    ),
    "uncond-negative": ({"uncond": ints([-2, 2])}, ValueError, "for 2 guided requests, got -2"),
    "uncond-twice": (
        {"uncond": ints([3, 3])},
        ValueError, r"in \[2, 4\) with a row for each guided request, got 3 twice",
    ),
    "x-device": ({"x": torch.ones(4, 96, device="meta")}, ValueError, "x on cpu, got meta"),
    "x-codes": ({"x": ints([0, 77])}, ValueError, r"codes of x in \[0, 77\), got 77"),
    "pages-type": ({"pages": None}, TypeError, "expected pages a DecoderPages, got NoneType"),
    "pages-dtype": (
        {"pages": DecoderPages(*[torch.ones(PAGES).double()] * 2)},
        TypeError, r"keys float32 \[2, 9, 2, 32, 24\].*got float64",
    ),
    "pages-mixed": (
        {"pages": DecoderPages(torch.ones(PAGES), torch.ones(PAGES).bfloat16())},
        TypeError, "values float32 .*got bfloat16",
    ),
    "pages-int8": (
        {"pages": new_decoder_pages(make_weights(ODD), 15, torch.int8)},
        TypeError, r"float32 or bfloat16 for the native decoder, got torch.int8 with scales",
    ),
    "pages-shape": (
        {"pages": DecoderPages(*[torch.ones(2, 9, 2, 16, 24)] * 2)}, ValueError, "keys float32",
    ),
    "table-dtype": ({"block_table": torch.zeros(4, 3).long()}, TypeError, r"int32 \[4, \*\]"),
    "table-range": (
        {"block_table": torch.full((4, 3), 99, dtype=torch.int32)},
        ValueError, r"block_table in \[0, 15\), got 99",
    ),
    "table-negative": (
        {"block_table": torch.full((4, 3), -1, dtype=torch.int32)}, ValueError, "got -1",
    ),
    "table-shared": (
        {"block_table": torch.zeros(4, 3, dtype=torch.int32)},
        ValueError, "pages of their own for new tokens, got page 0 twice",
    ),
    "positions-range": ({"positions": ints([0, 78])}, ValueError, r"\[0, 77\].*got 78"),
    "positions-table": (
        {"block_table": torch.arange(4, dtype=torch.int32)[:, None]}, ValueError, "1 pages; got 40",
    ),
    "positions-negative": ({"positions": ints([0, -1])}, ValueError, "got -1"),
    "positions-shape": ({"positions": ints(0)}, ValueError, r"positions \[B\], got \[\]"),
    "positions-dtype": ({"positions": torch.zeros(2)}, TypeError, r"int64 \[2\].*got float32"),
    "steps": ({"steps": 0}, ValueError, "integer steps >= 1, got 0"),
    "guidance": ({"guidance": torch.ones(2, 4)}, ValueError, r"guidance float32 \[2, 3\]"),
    "guidance-nan": ({"guidance": torch.full((2, 3), torch.nan)}, ValueError, "finite guidance"),
    "temperature": ({"temperature": ints([1.0, -1.0])}, ValueError, "temperature >= 0, got -1"),
    "top_k": ({"top_k": ints([1, -1], dtype=torch.int32)}, ValueError, "top_k >= 0, got -1"),
    "top_p": ({"top_p": ints([1.0, 0.0])}, ValueError, r"top_p in \(0, 1\], got 0"),
    "seeds": ({"seeds": ints([1, -5])}, ValueError, r"seeds in \[0, 2\^63\), got -5"),
    "forced": ({"forced": torch.full((2, 3), 77)}, ValueError, r"forced in \[-1, 77\), got 77"),
    "forced-shape": ({"forced": torch.zeros(2, 2).long()}, ValueError, r"forced int64 \[2, 3\]"),
    "threads": ({"threads": 0}, ValueError, "threads >= 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_of_run_are_named(change, error, message):
    call()
    with pytest.raises(error, match=message):
        call(**change)


def test_wrong_weights_are_named():
    weights = make_weights(ODD)
    layer = weights.layers[0]
    for change, error, message in (
        ({"head": weights.head.double()}, TypeError, "weights in one of .*float64"),
        ({"head": weights.head[:, :5]}, ValueError, r"expected head float32 \[77, 96\]"),
        ({"head": weights.head.to("meta")}, ValueError, "weights on cpu, got meta"),
        ({"norm": torch.ones(95)}, ValueError, "got float32"),
        ({"heads": 0}, ValueError, "heads >= 1 and kv_heads dividing them, got 0 and 2"),
        ({"kv_heads": 3}, ValueError, "got 4 and 3"),
        ({"eps": -1.0}, ValueError, r"eps in \[0, 1\)"),
        ({"layers": []}, ValueError, "expected layers of 7 tensors"),
        ({"layers": [layer._replace(up=layer.up.bfloat16())]}, ValueError, "gate and up of one"),
        ({"layers": [layer._replace(qkv=layer.qkv[:50])]}, ValueError, r"qkv float32 \[192, 96\]"),
        ({"cos": weights.cos[:9]}, ValueError, r"sin float32 \[9, 12\]"),
    ):
        with pytest.raises(error, match=message):
            NativeDecoder(weights._replace(**change))
    with pytest.raises(TypeError, match="expected DecoderWeights, got dict"):
        NativeDecoder({})
    int8 = weights.quantize(torch.int8)
    with pytest.raises(UnavailableError, match=r"expected int8 weights .*e4m3fn; fp8 needs"):
        NativeDecoder(weights.quantize(torch.float8_e4m3fn))
    with pytest.raises(TypeError, match=r"stored alike, got \['as given', 'torch.int8'\]"):
        NativeDecoder(int8._replace(head=weights.head))
    with pytest.raises(ValueError, match=r"scale float32 \[77\] .*got float32 \[5\]"):
        NativeDecoder(int8._replace(head=int8.head._replace(scale=torch.ones(5))))
    pages, table = make_pages(weights, 1, torch.float32)
    with pytest.raises(ValueError, match=r"isa: expected one of .*baseline, got sse9"):
        NativeDecoder(weights, isa="sse9").logits(torch.ones(1, 96), pages, table, ints([0]))


SAMPLE = (
    "logits",
    "uncond",
    "seeds",
    "positions",
    "guidance",
    "temperature",
    "top_k",
    "top_p",
    "codes",
)


def sample(logits, isa="", **change):
    from dar_kernels import _native

    R = len(logits)
    arguments = {
        "logits": logits, "uncond": torch.empty(0, 0), "seeds": torch.arange(R) * 2**40 + 7,
        "positions": torch.arange(R) * 1000, "guidance": torch.ones(R),
        "temperature": torch.ones(R), "top_k": torch.zeros(R, dtype=torch.int32),
        "top_p": torch.ones(R), "codes": torch.full((R,), -7),
    } | change  # fmt: skip
    _native.guided_sample(*(arguments[name] for name in SAMPLE), 2, isa)
    return arguments["codes"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("V", [1, 3, 64, 77, 4099], ids=str)
def test_draws_of_every_instruction_set(isa, V):
    """The argmax of logits and the noise that PyTorch makes, guided, at any temperature."""
    R = 40
    generator = torch.Generator().manual_seed(V)
    cond, uncond = torch.randn(2, R, V, generator=generator) * 3
    guidance, temperature = torch.rand(2, R, generator=generator) * 3 + 0.2
    codes = sample(cond, isa, uncond=uncond, guidance=guidance, temperature=temperature)
    rows = torch.arange(R)
    noise = gumbel(code_bits(rows * 2**40 + 7, rows * 1000, V)).double()
    s = guidance[:, None].double()
    guided = torch.where(s > 1, uncond + s * (cond - uncond).double(), cond.double())
    best = (guided / temperature[:, None] + noise).topk(min(2, V), dim=-1)
    decided = best.values[:, 0] - best.values[:, -1] > 1e-4 if V > 1 else torch.ones(R).bool()
    assert decided.sum() > 0.9 * R
    assert torch.equal(codes[decided], best.indices[decided, 0])
    greedy = sample(cond, isa, temperature=torch.zeros(R))
    assert torch.equal(greedy, cond.argmax(-1))


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_logits(isa):
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [nan, 1.0, nan],
            [inf, 0.0, 0.0],
            [-inf, -inf, -inf],
            [-inf, 5.0, -inf],
            [3e38, -3e38, 0.0],
        ]
    )
    for change in (
        {},
        {"top_k": torch.full((5,), 2, dtype=torch.int32)},
        {"top_p": torch.full((5,), 0.5)},
    ):
        assert sample(logits, isa, **change).tolist() == [1, 0, 0, 1, 0]
    assert sample(torch.zeros(3, 50), isa, temperature=torch.zeros(3)).tolist() == [0, 0, 0]
    kept = sample(torch.zeros(30, 50), isa, top_k=torch.ones(30, dtype=torch.int32))
    assert kept.unique().numel() > 5  # ties with the k-th stay


DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.bool,
)


@st.composite
def anything(draw):
    """A tensor of any small shape, dtype and strides, or no tensor at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([None, 3, "x", [], [torch.ones(2)], object()]))
    shape = draw(st.lists(st.integers(0, 5), max_size=5))
    values = draw(st.sampled_from([0.0, 1.0, -1.0, 7.0, 1e9]))
    tensor = torch.full(shape, values).to(draw(st.sampled_from(DTYPES)))
    return tensor.transpose(0, -1) if shape and draw(st.booleans()) else tensor


def entries():
    """Name → (function, good arguments) of the entry points."""
    from dar_kernels import _native

    weights = make_weights(ODD)
    pages, table = make_pages(weights, 2 * B, torch.float32)
    options = make_settings(B, n)
    build = (
        [list(layer) for layer in weights.layers], [], weights.norm, weights.head,
        weights.token_embedding, weights.cos, weights.sin, 4, 2, 1e-5,
    )  # fmt: skip
    decoder = _native.Decoder(*build)
    x, positions = torch.ones(2 * B, ODD.D), torch.tensor([0, 40])
    codes = torch.empty(B, n, dtype=torch.int64)
    uncond = torch.tensor([3, 2])
    run = (x, *pages[:2], table, positions, *options, None, codes, uncond, 2, "")
    rows = torch.tensor([0, 1, 2, 3])
    one = torch.ones(3)
    draws = (
        torch.randn(3, 9), torch.randn(3, 9), rows[:3], rows[:3], one, one,
        rows[:3].int(), one, torch.empty(3, dtype=torch.int64), 2, "",
    )  # fmt: skip
    return {
        "Decoder": (_native.Decoder, build),
        "run": (decoder.run, run),
        "logits": (decoder.logits, (x, *pages[:2], table, rows, torch.empty(4, ODD.V), 1, "")),
        "guided_sample": (_native.guided_sample, draws),
        "vq_nearest": (
            _native.vq_nearest,
            (torch.randn(4, 8), torch.randn(9, 8), torch.empty(4, dtype=torch.int64), 1, ""),
        ),
    }


@pytest.mark.parametrize("name", ["Decoder", "run", "logits", "guided_sample", "vq_nearest"])
def test_any_argument_raises_or_runs(name):
    function, good = entries()[name]
    function(*good)

    @settings(max_examples=150)
    @given(st.data())
    def fuzz(data):
        arguments = list(good)
        for _ in range(data.draw(st.integers(1, 2))):
            arguments[data.draw(st.integers(0, len(good) - 1))] = data.draw(anything())
        try:
            function(*arguments)
        except (TypeError, ValueError, BufferError, RuntimeError) as error:
            assert str(error)

    fuzz()
