"""linear_decode against its definition in fp64; interpreted, or on a GPU where there is one."""

import pytest
import torch
from torch import Tensor
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.dispatch import UnavailableError
from dar_kernels.linear_decode import _linear_decode, linear_decode, linear_decode_ref
from dar_kernels.quantize import QuantizedWeight, quantize_weight

triton = pytest.mark.skipif(not TRITON, reason="Triton neither runs nor is interpreted here")
STORED = [None, torch.int8, torch.float8_e4m3fn]


def draw(R, O_, D, dtype, stored=None):
    """x, weight, norm_weight and residual as a decode step has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    weight: Tensor | QuantizedWeight = (normal(O_, D) / D**0.5).to(dtype)
    if stored is not None:
        weight = quantize_weight(weight, stored)
    return (
        (3 * normal(R, D)).to(dtype),
        weight,
        (1 + 0.2 * normal(D)).to(dtype),
        normal(R, O_).to(dtype),
    )


def check(x, weight, norm_weight, residual, dtype, implementation):
    """The rule of truth.py; a quantised weight is the same in every dtype."""
    options = {"norm_weight": norm_weight, "residual": residual}
    names = [name for name, tensor in options.items() if tensor is not None]
    quantized = isinstance(weight, QuantizedWeight)

    def given(fn, **more):
        def run(x, *tensors):
            tensors = list(tensors)
            w = weight if quantized else tensors.pop(0)
            return fn(x, w, **dict(zip(names, tensors, strict=True)), **more)

        return run

    inputs = [x] + ([] if quantized else [weight]) + [options[name] for name in names]
    check_against_truth(
        given(linear_decode, implementation=implementation),
        given(linear_decode_ref), inputs, dtype, gradients=False,
    )  # fmt: skip


@triton
@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "O_", "D", "norm", "residual"),
    [
        (1, 24, 256, False, False),
        (2, 35, 77, True, True),  # nothing a multiple of 8
        (16, 16, 1000, True, False),
        (9, 33, 515, False, True),
    ],
)
def test_no_less_accurate_than_torch(R, O_, D, norm, residual, dtype, stored):
    x, weight, norm_weight, added = draw(R, O_, D, dtype, stored)
    check(x, weight, norm_weight if norm else None, added if residual else None, dtype, "triton")


@triton
@pytest.mark.parametrize(
    ("O_", "D", "dtype", "stored"),
    [
        (256, 1024, torch.bfloat16, None),  # L, a quarter of the output projection
        (96, 3200, torch.bfloat16, torch.int8),  # 3B: D is no multiple of 256
        (256, 768, torch.float16, torch.float8_e4m3fn),  # demo, down
    ],
    ids=str,
)
def test_preset_widths(O_, D, dtype, stored):
    x, weight, norm_weight, residual = draw(2, O_, D, dtype, stored)
    check(x, weight, norm_weight, residual, dtype, "triton")


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_alone(dtype):
    """To the bit: whatever the other rows hold and however many they are."""
    x, weight, norm_weight, residual = draw(19, 21, 304, dtype)
    x[7] = float("nan")

    def run(rows):
        return linear_decode(
            x[rows], weight, norm_weight=norm_weight, residual=residual[rows],
            implementation="triton",
        )  # fmt: skip

    def same(some, all_):
        torch.testing.assert_close(some, all_, rtol=0, atol=0, equal_nan=True)

    eight, sixteen = run(slice(0, 8)), run(slice(0, 16))
    for count in (1, 2, 7):
        same(run(slice(0, count)), eight[:count])
    same(run(slice(5, 6))[0], eight[5])
    same(run(slice(0, 9)), sixteen[:9])
    same(run(slice(0, 19))[:16], sixteen)
    assert sixteen[6].isfinite().all() and sixteen[8].isfinite().all()
    if DEVICE == "cuda" or dtype == torch.float32:  # numpy's sums go by the width of a tile
        same(eight, sixteen[:8])


@triton
def test_strides():
    """Rows of a wider tensor, a transposed x, a weight that is a part of a stacked one."""
    x, weight, norm_weight, residual = draw(4, 24, 96, torch.float32)
    wide = torch.zeros(4, 200, device=DEVICE)
    wide[:, 50:146] = x
    stacked = torch.cat((weight, weight), 1)
    want = linear_decode_ref(x, weight, norm_weight, 1e-5, residual)
    for x_, w in ((wide[:, 50:146], stacked[:, 96:]), (x.T.contiguous().T, weight[:, :])):
        got = linear_decode(
            x_, w, norm_weight=norm_weight, residual=residual.T.contiguous().T,
            implementation="triton",
        )  # fmt: skip
        torch.testing.assert_close(got, want)


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rows(dtype):
    """A row of zeros, a large and a tiny one: each normalised, none disturbing another."""
    x, weight, norm_weight, _ = draw(4, 16, 64, dtype)
    x[0] = 0
    x[1] *= 1e4
    x[2] *= 1e-4
    for row in range(1, 4):
        check(x[row : row + 1], weight, norm_weight, None, dtype, "triton")
    y = linear_decode(x, weight, norm_weight=norm_weight, implementation="triton")
    assert (y[0] == 0).all() and y.isfinite().all()


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_implementation(dtype, stored):
    x, weight, norm_weight, residual = draw(3, 17, 50, dtype, stored)
    check(x, weight, norm_weight, residual, dtype, "torch")
    check(x, weight, None, None, dtype, "torch")


def test_torch_rounds_as_the_prior():
    from dar_fast.models.prior_block import RMSNorm

    x, weight, norm_weight, residual = draw(3, 17, 50, torch.bfloat16)
    norm = RMSNorm(50, 1e-5).to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(norm_weight)
        want = residual + torch.nn.functional.linear(norm(x).normed, weight)
    got = linear_decode(
        x, weight, norm_weight=norm_weight, residual=residual, implementation="torch"
    )
    assert torch.equal(got, want)


def test_gradients_of_torch():
    x, weight, norm_weight, residual = (
        t.double().requires_grad_() for t in draw(2, 5, 6, torch.float32)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, n, r: linear_decode(x, w, norm_weight=n, residual=r),
        (x, weight, norm_weight, residual),
    )


@triton
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_registration(stored):
    x, weight, norm_weight, residual = draw(3, 20, 40, torch.float16, stored)
    values, scale = weight if stored else (weight, None)
    tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if values.dtype != torch.float8_e4m3fn:  # PyTorch's own comparison cannot multiply it
        tests.append("test_schema")
    for norm, added in ((norm_weight, residual), (None, None)):
        arguments = (x, values, scale, norm, 1e-5, added)
        torch.library.opcheck(_linear_decode, arguments, test_utils=tests)


@pytest.mark.parametrize("implementation", [pytest.param("triton", marks=triton), "torch"])
def test_compiles_whole(implementation):
    x, weight, norm_weight, residual = draw(2, 20, 40, torch.float32, torch.int8)

    def step(x):
        return linear_decode(
            x, weight, norm_weight=norm_weight, residual=residual, implementation=implementation
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x), rtol=0, atol=0)


def test_messages():
    x, weight, norm_weight, residual = draw(2, 8, 16, torch.float32)
    quantized = quantize_weight(weight)

    def fails(error, match, *args, **kwargs):
        with pytest.raises(error, match="linear_decode: " + match):
            linear_decode(*args, **kwargs)

    fails(TypeError, "expected x a tensor, got list", [1.0], weight)
    fails(TypeError, "expected x in .*, got torch.int64", x.long(), weight)
    fails(ValueError, r"expected x \[R >= 1, D >= 1\], got \[16\]", x[0], weight)
    fails(ValueError, r"expected x \[R >= 1, D >= 1\], got \[0, 16\]", x[:0], weight)
    fails(TypeError, "expected weight a tensor, got tuple", x, tuple(quantized))
    fails(TypeError, "expected weight in torch.float32, got torch.float16", x, weight.half())
    fails(TypeError, "expected weight in torch.float32, got torch.int8", x, quantized.values)
    fails(ValueError, r"expected weight \[O >= 1, 16\], got \[16\]", x, weight[0])
    fails(ValueError, r"expected weight \[O >= 1, 16\], got \[8, 15\]", x, weight[:, 1:])
    fails(ValueError, "expected weight contiguous along D, got strides", x, weight.T.contiguous().T)
    fails(
        TypeError, "expected weight in one of .*int8, .*float8_e4m3fn, got torch.int16",
        x, QuantizedWeight(quantized.values.short(), quantized.scale),
    )  # fmt: skip
    fails(
        ValueError, r"expected weight.scale \[8\], got \[7\]",
        x, QuantizedWeight(quantized.values, quantized.scale[1:]),
    )  # fmt: skip
    fails(
        TypeError, "expected weight.scale in torch.float32, got torch.float16",
        x, QuantizedWeight(quantized.values, quantized.scale.half()),
    )  # fmt: skip
    fails(
        ValueError, r"expected norm_weight \[16\], got \[15\]",
        x, weight, norm_weight=norm_weight[1:],
    )  # fmt: skip
    fails(
        TypeError, "expected norm_weight in torch.float32, got torch.float16",
        x, weight, norm_weight=norm_weight.half(),
    )  # fmt: skip
    fails(ValueError, r"expected residual \[2, 8\]", x, weight, residual=residual[:1])
    fails(ValueError, "expected residual on", x, weight, residual=residual.to("meta"))
    fails(ValueError, "expected eps >= 0, got -1", x, weight, norm_weight=norm_weight, eps=-1)
    fails(ValueError, "expected implementation one of", x, weight, implementation="native")
    with pytest.raises(UnavailableError, match=r"takes torch\.float32, torch\.float16"):
        linear_decode(x.double(), weight.double(), implementation="triton")
