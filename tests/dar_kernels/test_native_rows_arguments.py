"""Any arguments of the C++ row passes and attention either compute what they say or raise."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dar_kernels import native
from dar_kernels.normed_attention import normed_attention_ref

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="the extension is not built")
DTYPE = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64])
ISA = st.sampled_from(["", *native.isa_supported(), "sse9"])
SIZE = st.integers(0, 5)


@st.composite
def tensors(draw, right, likely=0.7):
    """Tensors of these shapes and dtypes; now and then one of another shape, dtype or stride."""
    made = []
    for shape, dtype in right:
        if draw(st.floats(0, 1)) > likely:
            shape = tuple(draw(st.lists(SIZE, min_size=len(shape) - 1, max_size=len(shape) + 1)))
            dtype = draw(DTYPE)
        x = torch.randn(shape).to(dtype)
        if draw(st.booleans()) and x.ndim > 1 and draw(st.floats(0, 1)) > likely:
            x = x.transpose(0, -1)
        made.append(None if draw(st.floats(0, 1)) > 0.95 else x)
    return made


@given(data=st.data(), B=st.integers(1, 3), N=st.integers(1, 4), D=st.integers(1, 20))
def test_bias_silu(data, B, N, D):
    from dar_kernels import _native

    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    likely = data.draw(st.sampled_from([0.6, 1.0]))
    shapes = [((B, N, D), dtype), ((B, 1, D), dtype), ((B, N, D), dtype)]
    x, bias, out = data.draw(tensors(shapes, likely))
    threads, isa = data.draw(st.integers(-1, 3)), data.draw(ISA)
    try:
        _native.bias_silu(x, bias, out, threads, isa)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        torch.testing.assert_close(
            out.float(), F.silu(x.float() + bias.float()), rtol=2**-7, atol=1e-6
        )


@given(
    data=st.data(), B=st.integers(1, 2), N=st.integers(1, 3), H=st.integers(1, 3),
    half=st.integers(1, 4), Q=st.integers(1, 34),
)  # fmt: skip
def test_key_weights(data, B, N, H, half, Q):
    from dar_kernels import _native

    dtype, fp32, Dh = (
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        torch.float32,
        2 * half,
    )
    likely = data.draw(st.sampled_from([0.7, 1.0]))
    shapes = [
        ((B, N, H * Dh), dtype), ((Dh,), dtype), ((Dh,), dtype), ((N, half), fp32),
        ((N, half), fp32), ((B, H, Q, Dh), dtype), ((B, N, H * Q), dtype),
    ]  # fmt: skip
    arguments = data.draw(tensors(shapes, likely))
    threads, isa = data.draw(st.integers(-1, 3)), data.draw(ISA)
    try:
        _native.key_weights(*arguments, 1e-6, threads, isa)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        out = arguments[-1].float().view(B, N, H, Q)
        torch.testing.assert_close(out.sum(-1), torch.ones(B, N, H), rtol=0.02, atol=0)


@given(
    data=st.data(), B=st.integers(1, 2), N=st.integers(1, 5), H=st.integers(1, 2),
    Dh=st.sampled_from([2, 16, 24, 32, 64, 128]),
)  # fmt: skip
def test_attention(data, B, N, H, Dh):
    from dar_kernels import _native

    bf16, fp32 = torch.bfloat16, torch.float32
    likely = data.draw(st.sampled_from([0.8, 1.0]))
    shapes = [((B, N, H * Dh), bf16)] * 3 + [((Dh,), bf16)] * 4 + [((N, Dh // 2), fp32)] * 2
    arguments = data.draw(tensors([*shapes, shapes[0]], likely))
    threads = data.draw(st.integers(-1, 3))
    try:
        _native.attention(*arguments, 1e-6, threads)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert _native.attention_supported(Dh)
        *inputs, cos, sin, out = arguments
        tables = [None if t is None else t.double() for t in (cos, sin)]
        expected = normed_attention_ref(*(x.double() for x in inputs), *tables)
        torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.1)
