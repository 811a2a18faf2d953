"""The C++ row passes of the pixel DiT against fp64, in every instruction set; their arguments."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from truth import EPS, relative_error

from dar_kernels import native
from dar_kernels.adaln_cross_attention import adaln_cross_attention_ref
from dar_kernels.modulate_native import (
    NATIVE_DTYPES,
    adaln_cross_attention,
    gate_residual_modulate,
    modulate,
)

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the extension is not built")
ISAS = native.isa_supported()
DTYPE = pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
ISA = pytest.mark.parametrize("isa", ISAS)


def ln(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def hold(ours, reference, inputs):
    """err ≤ 2 · err of the same expression in the same dtype + eps."""
    truth = reference(*(x.double() for x in inputs))
    bound = 2 * relative_error(reference(*inputs), truth) + EPS
    assert relative_error(ours, truth) <= bound


@ISA
@DTYPE
@pytest.mark.parametrize(("B", "N", "D"), [(1, 1, 1), (2, 37, 96), (1, 20, 768), (3, 5, 33)])
def test_modulate(isa, dtype, B, N, D):
    generator = torch.Generator().manual_seed(0)
    x, *chunks = torch.randn(B, N, 7 * D, generator=generator).to(dtype).chunk(7, -1)  # strided
    hold(modulate(x, None, None, isa=isa), ln, [x])
    shift, scale, gate, y = chunks[:4]
    hold(modulate(x, shift, scale, isa=isa), lambda a, b, c: ln(a) * (1 + c) + b, [x, shift, scale])
    residual, modulated = gate_residual_modulate(x, y, gate, shift, scale, isa=isa)
    hold(residual, lambda a, b, c: a + b * c, [x, y, gate])
    hold(modulated, lambda a, b, c: ln(a) * (1 + c) + b, [residual, shift, scale])
    plain = gate_residual_modulate(x, y, gate, None, None, isa=isa)
    assert torch.equal(plain[0], residual)
    hold(plain[1], ln, [residual])


@ISA
@DTYPE
@pytest.mark.parametrize(
    ("B", "N", "H", "Q", "Dh"), [(2, 9, 3, 32, 64), (1, 1, 1, 1, 2), (2, 6, 2, 7, 16)], ids=str
)
def test_cross_attention(isa, dtype, B, N, H, Q, Dh):
    D = H * Dh
    shapes = [(B, N, D), (D, D), (D,), (Dh,), (Dh,), (B, H, Q, Dh), (B, H, Q, D), (D,), (B, D)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors[1] *= D**-0.5
    tensors = [t.to(dtype) for t in tensors]
    angles = torch.randn(N, Dh // 2, generator=generator)
    tables = angles.cos(), angles.sin()
    ours = adaln_cross_attention(*tensors, *tables, isa=isa)
    hold(ours, lambda *t: adaln_cross_attention_ref(*t, *tables), tensors)


@ISA
def test_silu_and_softmax_far_out(isa):
    from dar_kernels import _native

    x = torch.tensor([[[-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 200.0, 1e30]]])
    out = torch.empty_like(x)
    _native.bias_silu(x, torch.zeros_like(x), out, 1, isa)
    torch.testing.assert_close(out, F.silu(x.double()).float(), atol=1e-30, rtol=1e-6)
    q = torch.tensor([[[100.0, -100.0]]])
    keys = 1e4 * torch.tensor([[[[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]]])
    weights = torch.empty(1, 1, 3)
    one, zero = torch.ones(2), torch.zeros(2)
    _native.key_weights(q, one, zero, None, None, keys, weights, 1e-6, 1, isa)
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0.0, 0.0]]]), atol=1e-30, rtol=0)


@ISA
def test_bf16_rounds_to_nearest_even_and_keeps_nan(isa):
    from dar_kernels import _native

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 50, 64, generator=generator)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    low = x.bfloat16()
    gate = torch.ones_like(low)
    residual, _ = gate_residual_modulate(low, torch.zeros_like(low), gate, None, None, isa=isa)
    assert torch.equal(residual, low)
    low[0, 0, 0] = float("nan")
    _native.modulate(low, None, None, None, None, None, out, 1e-6, 1, isa)
    assert out[0, 0].isnan().all()
    assert out[0, 1:].isfinite().all()


@given(
    shapes=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 20)), min_size=7, max_size=7
    ),
    absent=st.lists(st.booleans(), min_size=7, max_size=7),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=7, max_size=7),
    alike=st.booleans(),
    threads=st.integers(-1, 4),
    isa=st.sampled_from(["", *ISAS, "sse9"]),
)
def test_any_arguments_compute_or_raise(shapes, absent, dtypes, alike, threads, isa):
    from dar_kernels import _native

    if alike:
        shapes, dtypes = [shapes[0]] * 7, [dtypes[0]] * 7
    tensors = [
        None if gone else torch.randn(shape).to(dtype)
        for shape, gone, dtype in zip(shapes, absent, dtypes, strict=True)
    ]
    try:
        _native.modulate(*tensors, 1e-6, threads, isa)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        x, y, gate, _, _, residual, modulated = tensors
        expected = x if y is None else x + gate * y
        if residual is not None:
            torch.testing.assert_close(residual, expected, atol=0.05, rtol=0.05)
        assert modulated.shape == x.shape
        assert threads >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"y": None}, "expected y, gate and residual together"),
        ({"shift": None}, "expected shift and scale together"),
        ({"gate": (2, 3, 9)}, r"expected gate \[2, 3, 8\]"),
        ({"scale": (2, 2, 8)}, r"expected scale \[2, 3, 8\]"),
        ({"modulated": (2, 3, 7)}, "expected modulated of the shape of the result"),
    ],
    ids=["y", "shift", "width", "rows", "out"],
)
def test_wrong_arguments_are_named(arguments, message):
    from dar_kernels import _native

    names = ("x", "y", "gate", "shift", "scale", "residual", "modulated")
    shapes = dict.fromkeys(names, (2, 3, 8)) | arguments
    tensors = [None if shape is None else torch.zeros(shape) for shape in shapes.values()]
    with pytest.raises(ValueError, match=f"modulate: {message}"):
        _native.modulate(*tensors, 1e-6, 1)
    with pytest.raises(ValueError, match="modulate: expected threads >= 1"):
        _native.modulate(*(torch.zeros(2, 3, 8) for _ in names), 1e-6, 0)
    with pytest.raises(ValueError, match=r"isa: expected one of .* got sse9"):
        _native.modulate(*(torch.zeros(2, 3, 8) for _ in names), 1e-6, 1, "sse9")
