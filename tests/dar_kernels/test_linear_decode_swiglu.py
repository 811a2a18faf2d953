"""linear_decode_swiglu against its definition in fp64; interpreted, or on a GPU."""

import pytest
import torch
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels.dispatch import UnavailableError
from dar_kernels.linear_decode_swiglu import (
    _linear_decode_swiglu,
    linear_decode_swiglu,
    linear_decode_swiglu_ref,
)
from dar_kernels.quantize import quantize_weight

triton = pytest.mark.skipif(not TRITON, reason="Triton neither runs nor is interpreted here")
IMPLEMENTATIONS = [pytest.param("triton", marks=triton), "torch"]


def draw(R, F, D, dtype, stored=None):
    """x, gate and up weights, norm_weight."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    gate, up = ((normal(F, D) / D**0.5).to(dtype) for _ in range(2))
    if stored is not None:
        gate, up = quantize_weight(gate, stored), quantize_weight(up, stored)
    return (3 * normal(R, D)).to(dtype), gate, up, (1 + 0.2 * normal(D)).to(dtype)


def check(x, gate, up, norm_weight, dtype, implementation):
    """The rule of truth.py; quantised weights are the same in every dtype."""
    weights = [gate, up]
    plain = isinstance(gate, torch.Tensor)

    def given(fn, **more):
        def run(x, *tensors):
            rest = list(tensors)
            gate, up = (rest.pop(0), rest.pop(0)) if plain else weights
            return fn(x, gate, up, norm_weight=rest[0] if rest else None, **more)

        return run

    inputs = [x, *(weights if plain else []), *([] if norm_weight is None else [norm_weight])]
    check_against_truth(
        given(linear_decode_swiglu, implementation=implementation),
        given(linear_decode_swiglu_ref), inputs, dtype, gradients=False,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("R", "F", "D"), [(1, 19, 77), (16, 32, 520), (17, 7, 64)])
def test_no_less_accurate_than_torch(R, F, D, dtype, stored, implementation):
    x, gate, up, norm_weight = draw(R, F, D, dtype, stored)
    check(x, gate, up, norm_weight if R > 1 else None, dtype, implementation)


@triton
def test_preset_width():
    x, gate, up, norm_weight = draw(2, 96, 1024, torch.bfloat16)  # L; F is 2816 there
    check(x, gate, up, norm_weight, torch.bfloat16, "triton")


@triton
def test_a_row_is_alone():
    x, gate, up, norm_weight = draw(16, 20, 304, torch.float32)
    x[3] = float("nan")
    x[4] = 0

    def run(rows):
        return linear_decode_swiglu(
            x[rows], gate, up, norm_weight=norm_weight, implementation="triton"
        )

    def same(some, all_):
        torch.testing.assert_close(some, all_, rtol=0, atol=0, equal_nan=True)

    eight, sixteen = run(slice(0, 8)), run(slice(0, 16))
    same(run(slice(2, 3))[0], eight[2])
    same(run(slice(0, 11)), sixteen[:11])
    assert sixteen[2].isfinite().all() and (sixteen[4] == 0).all()
    same(eight, sixteen[:8])


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gates(dtype):
    """Gates of hundreds, whose exponential would overflow; strided x and weights."""
    x, gate, up, _ = draw(4, 16, 64, dtype)
    gate = 100 * gate
    check(x.T.contiguous().T, gate, up, None, dtype, "triton")
    both = torch.cat((gate, up), 1)
    want = linear_decode_swiglu(x, gate, up, implementation="triton")
    wide = torch.cat((x, x), 1)[:, 64:]
    got = linear_decode_swiglu(wide, both[:, :64], both[:, 64:], implementation="triton")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_torch_rounds_as_the_prior():
    from dar_fast.models.prior_block import RMSNorm, SwiGLU

    x, gate, up, norm_weight = draw(3, 17, 50, torch.bfloat16)
    norm, mlp = RMSNorm(50, 1e-5), SwiGLU(50, 17)
    norm.to(DEVICE, torch.bfloat16), mlp.to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        norm.weight.copy_(norm_weight)
        mlp.gate.weight.copy_(gate)
        mlp.up.weight.copy_(up)
        h = norm(x).normed
        want = torch.nn.functional.silu(mlp.gate(h)) * mlp.up(h)
    got = linear_decode_swiglu(x, gate, up, norm_weight=norm_weight, implementation="torch")
    assert torch.equal(got, want)


def test_gradients_of_torch():
    inputs = [t.double().requires_grad_() for t in draw(2, 5, 6, torch.float32)]
    assert torch.autograd.gradcheck(
        lambda x, g, u, n: linear_decode_swiglu(x, g, u, norm_weight=n), inputs
    )


@triton
def test_registration():
    x, gate, up, norm_weight = draw(3, 20, 40, torch.float16)
    torch.library.opcheck(_linear_decode_swiglu, (x, gate, None, up, None, norm_weight, 1e-5))
    x, gate, up, _ = draw(3, 20, 40, torch.float16, torch.int8)
    torch.library.opcheck(_linear_decode_swiglu, (x, *gate, *up, None, 1e-5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_whole(implementation):
    x, gate, up, norm_weight = draw(2, 20, 40, torch.float32, torch.int8)

    def step(x):
        return linear_decode_swiglu(
            x, gate, up, norm_weight=norm_weight, implementation=implementation
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x), rtol=0, atol=0)


def test_messages():
    x, gate, up, _ = draw(2, 8, 16, torch.float32)

    def fails(error, match, *args, **kwargs):
        with pytest.raises(error, match="linear_decode_swiglu: " + match):
            linear_decode_swiglu(*args, **kwargs)

    fails(TypeError, "expected gate_weight a tensor, got NoneType", x, None, up)
    fails(TypeError, "expected up_weight a tensor, got int", x, gate, 3)
    fails(ValueError, r"expected gate_weight \[O >= 1, 16\], got \[0, 16\]", x, gate[:0], up)
    fails(ValueError, r"expected gate_weight \[O >= 1, 16\], got \[8, 4\]", x, gate[:, :4], up)
    fails(ValueError, r"expected up_weight \[8, 16\], got \[7, 16\]", x, gate, up[1:])
    fails(ValueError, "expected up_weight contiguous along D", x, gate, up.T.contiguous().T)
    fails(
        TypeError, "expected up_weight in torch.int8, got torch.float32",
        x, quantize_weight(gate), up,
    )  # fmt: skip
    fails(ValueError, r"expected norm_weight \[16\]", x, gate, up, norm_weight=gate)
    fails(ValueError, "expected eps >= 0, got nan", x, gate, up, eps=float("nan"))
    fails(ValueError, "expected implementation one of", x, gate, up, implementation="native")
    with pytest.raises(UnavailableError, match="linear_decode_swiglu on cpu"):
        linear_decode_swiglu(*(t.double().cpu() for t in (x, gate, up)), implementation="triton")
