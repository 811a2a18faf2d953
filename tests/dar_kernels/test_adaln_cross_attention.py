"""adaln_cross_attention against its definition in fp64, PyTorch and Triton from one file."""

import pytest
import torch
import torch.nn.functional as F
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels import adaln_cross_attention_forward as forward
from dar_kernels import native
from dar_kernels.adaln_cross_attention import (
    _adaln_cross_attention,
    absorb_output,
    adaln_cross_attention,
    adaln_cross_attention_ref,
)
from dar_kernels.adaln_cross_attention_backward import attention_backward
from dar_kernels.dispatch import UnavailableError
from dar_kernels.linear import pack_weight, packs
from dar_kernels.modulate_native import NATIVE_DTYPES

needs_triton = pytest.mark.skipif(not TRITON, reason="Triton cannot run here")
needs_native = pytest.mark.skipif(native.missing() is not None, reason="the extension is not built")
EVERY = pytest.mark.parametrize(
    "implementation",
    [
        "torch",
        pytest.param("triton", marks=needs_triton),
        pytest.param("native", marks=needs_native),
    ],
)
NAMES = (
    "x", "q_weight", "q_bias", "q_norm_weight", "q_norm_bias", "keys", "values_out", "out_bias",
    "time", "cos", "sin",
)  # fmt: skip


def draw(B, N, D, H, Q, dtype=torch.float32):
    """Every argument by name."""
    generator = torch.Generator().manual_seed(B * N + D + Q)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    angles = 3 * normal(N, D // H // 2)
    tensors = (
        2 * normal(B, N, D) + 0.5, normal(D, D) * D**-0.5, normal(D), 1 + 0.3 * normal(D // H),
        0.3 * normal(D // H), normal(B, H, Q, D // H), 0.3 * normal(B, H, Q, D), normal(D),
        normal(B, D),
    )  # fmt: skip
    tensors = (*(t.to(dtype) for t in tensors), angles.cos(), angles.sin())
    return {n: t.to(DEVICE) for n, t in zip(NAMES, tensors, strict=True)}


def check(arguments, dtype):
    """The rule for every input but the tables, which stay in fp32."""
    *inputs, cos, sin = arguments.values()
    check_against_truth(
        lambda *t: adaln_cross_attention(*t, cos, sin, implementation="triton"),
        lambda *t: adaln_cross_attention_ref(*t, cos, sin),
        inputs,
        dtype,
    )


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 37, 128, 2, 32),
        (1, 70, 48, 3, 5),
        (1, 130, 36, 2, 8),
        (1, 1, 64, 1, 1),
        (1, 3, 16, 1, 50),
    ],
    ids=str,
)
def test_no_less_accurate_than_torch(shape, dtype):
    check(draw(*shape), dtype)


@needs_triton
def test_published_width():
    check(draw(1, 3, 768, 12, 32), torch.bfloat16)


@needs_triton
def test_tiles_of_a_large_batch(monkeypatch):
    for name in ("query_tiling", "_output_tiling"):
        choose = getattr(forward, name)
        monkeypatch.setattr(forward, name, lambda B, *sizes, f=choose: f(1000 * B, *sizes))
    assert forward.query_tiling(1, 5, 128, 2, 32, torch.float16, False)[0]["BLOCK_M"] == 128
    check(draw(1, 5, 128, 2, 32), torch.float16)


EXTREMES = {
    "offset": {"x": lambda t: t + 300},
    "large": {"x": lambda t: t * 3000},
    "small": {"x": lambda t: t * 1e-3},
    "constant": {"x": lambda t: torch.full_like(t, 7)},
    "one-hot": {"keys": lambda t: t * 60},
    "saturated": {"time": lambda t: t.sign() * 90},
}


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", EXTREMES.values(), ids=EXTREMES)
def test_extreme_values(change, dtype):
    arguments = draw(1, 5, 32, 2, 8)
    check(arguments | {n: f(arguments[n]) for n, f in change.items()}, dtype)


@needs_triton
def test_strides():
    """Transposed views give the bits that copies give, in every gradient too."""
    plain = draw(2, 7, 64, 2, 8)
    flipped = {
        n: t.mT.contiguous().mT for n, t in plain.items() if t.ndim > 1 and n != "values_out"
    }
    flipped["values_out"] = plain["values_out"].transpose(0, 1).contiguous().transpose(0, 1)
    odd = dict(plain, values_out=plain["values_out"].mT.contiguous().mT)
    dy = torch.randn(1, 1, 64, device=DEVICE).expand(2, 7, 64)
    results = []
    for arguments in (plain, plain | flipped, odd):
        leaves = [t.detach().requires_grad_() for t in list(arguments.values())[:9]]
        y = adaln_cross_attention(
            *leaves, arguments["cos"], arguments["sin"], implementation="triton"
        )
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERY
def test_equals_the_unabsorbed_form(implementation):
    """LN, projection, norm of each head, rotation, SDPA and the output projection one by one."""
    device = "cpu" if implementation == "native" else DEVICE
    a = {n: t.to(device) for n, t in draw(2, 5, 64, 2, 8).items()}
    values = torch.randn(2, 2, 8, 32, device=device)
    proj = torch.randn(64, 64, device=device) / 8
    q = F.linear(F.layer_norm(a["x"], (64,), eps=1e-6), a["q_weight"], a["q_bias"])
    q = q.view(2, 5, 2, 32).transpose(1, 2)
    q = F.layer_norm(q, (32,), a["q_norm_weight"], a["q_norm_bias"], 1e-6)
    pairs = torch.view_as_complex(q.reshape(2, 2, 5, 16, 2))
    q = torch.view_as_real(pairs * torch.complex(a["cos"], a["sin"])).flatten(-2)
    s = F.scaled_dot_product_attention(q, a["keys"], values).transpose(1, 2).flatten(2)
    a["values_out"] = absorb_output(values, proj)
    y = adaln_cross_attention(**a, implementation=implementation)
    expected = F.silu(a["time"][:, None] + F.linear(s, proj, a["out_bias"]))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=needs_triton)])
def test_autocast(implementation):
    a = draw(1, 5, 64, 2, 8)
    a["time"], a["values_out"] = a["time"].bfloat16(), a["values_out"].bfloat16()
    leaves = [t.requires_grad_() for t in list(a.values())[:9]]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = adaln_cross_attention(*a.values(), implementation=implementation)
    assert y.dtype == torch.bfloat16
    truth = adaln_cross_attention_ref(*(t.double() for t in a.values()))
    assert (y - truth).norm() < 1e-2 * truth.norm()
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    expected = torch.autograd.grad(truth, leaves, torch.ones_like(truth))
    for name, g, e, leaf in zip(NAMES, gradients, expected, leaves, strict=False):
        assert g.dtype == leaf.dtype
        assert (g.double() - e).norm() < 3e-2 * e.norm(), name


def test_absorbed_projection():
    values = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 12, dtype=torch.float64, requires_grad=True)
    rows = values.transpose(1, 2).flatten(2) @ weight.T  # all heads attend to the same key
    torch.testing.assert_close(absorb_output(values, weight).sum(1), rows)
    assert torch.autograd.gradcheck(absorb_output, (values, weight), fast_mode=True)


def test_gradients_of_torch():
    a = draw(1, 3, 8, 2, 3, torch.float64)
    for t in list(a.values())[:9]:
        t.requires_grad_()
    assert torch.autograd.gradcheck(adaln_cross_attention, tuple(a.values()), fast_mode=True)


@needs_native
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_the_processor_without_gradients(dtype):
    *inputs, cos, sin = (t.cpu() for t in draw(2, 5, 64, 2, 8).values())

    def ours(*t):
        return adaln_cross_attention(*t, cos, sin)

    def same(*t):
        return adaln_cross_attention_ref(*t, cos, sin)

    check_against_truth(ours, same, inputs, dtype, gradients=False)
    low = [t.to(dtype) for t in inputs]
    with torch.no_grad():
        y = ours(*low)
        assert torch.equal(y, adaln_cross_attention(*low, cos, sin, implementation="native"))
        if packs(low[1]):
            assert torch.equal(y, ours(low[0], pack_weight(low[1]), *low[2:]))
    low[0].requires_grad_()
    with pytest.raises(UnavailableError, match="native: has no backward"):
        adaln_cross_attention(*low, cos, sin, implementation="native")
    assert ours(*low).requires_grad


@needs_triton
def test_registration():
    a = [t.requires_grad_(i < 9) for i, t in enumerate(draw(1, 2, 16, 1, 4).values())]
    torch.library.opcheck(_adaln_cross_attention, tuple(a))
    y, probs, stats = (t.detach() for t in _adaln_cross_attention(*a))
    inputs = (torch.randn_like(y), *(t.detach() for t in a), probs, stats)
    torch.library.opcheck(attention_backward, inputs)


@pytest.mark.parametrize("implementation", ["torch", pytest.param("triton", marks=needs_triton)])
def test_compiles_without_a_graph_break(implementation):
    def run(function):
        a = draw(1, 3, 32, 2, 4)
        leaves = [t.requires_grad_() for t in list(a.values())[:9]]
        y = function(*a.values(), implementation=implementation)
        return y, *torch.autograd.grad(y.sum(), leaves)

    compiled = torch.compile(adaln_cross_attention, fullgraph=True, backend="aot_eager")
    for eager, same in zip(run(adaln_cross_attention), run(compiled), strict=True):
        torch.testing.assert_close(eager, same)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "expected x a tensor, got list"),
        ({"keys": torch.ones(1, 2, 4, 16).int()}, TypeError, r"keys in .*32, got torch.int32"),
        ({"x": torch.ones(3, 32)}, ValueError, r"x \[B >= 1, N .*, D .*\], got \[3, 32\]"),
        ({"x": torch.ones(1, 0, 32)}, ValueError, r"N >= 1, D >= 1\], got \[1, 0, 32\]"),
        ({"keys": torch.ones(1, 4, 16)}, ValueError, r"keys \[1, H .*, Q .*, Dh .*\], got \[1, 4"),
        ({"keys": torch.ones(1, 3, 4, 16)}, ValueError, r"H Dh = 32, Dh even, got \[1, 3, 4, 16\]"),
        ({"keys": torch.ones(1, 32, 4, 1)}, ValueError, r"Dh even, got \[1, 32, 4, 1\]"),
        ({"keys": torch.ones(2, 2, 4, 16)}, ValueError, r"keys \[1, H .*\], got \[2, 2, 4"),
        ({"q_weight": torch.ones(32, 31)}, ValueError, r"q_weight \[32, 32\], got \[32, 31\]"),
        ({"q_norm_bias": torch.ones(32)}, ValueError, r"q_norm_bias \[16\], got \[32\]"),
        ({"values_out": torch.ones(1, 2, 4, 16)}, ValueError, r"values_out \[1, 2, 4, 32\]"),
        ({"time": torch.ones(2, 32)}, ValueError, r"expected time \[1, 32\], got \[2, 32\]"),
        ({"cos": torch.ones(3, 16)}, ValueError, r"expected cos \[3, 8\], got \[3, 16\]"),
        ({"time": torch.ones(1, 32, device="meta")}, ValueError, "time on cpu, got meta"),
        ({"time": torch.ones(1, 32).half()}, TypeError, "time in torch.float32, got torch.float16"),
        ({"sin": torch.ones(3, 8).half()}, TypeError, "sin in torch.float32, got torch.float16"),
        ({"implementation": "cuda"}, ValueError, "implementation one of triton, native, torch"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, error, message):
    arguments = {n: t.cpu() for n, t in draw(1, 3, 32, 2, 4).items()}
    with pytest.raises(error, match=message):
        adaln_cross_attention(**(arguments | change))


@needs_triton
@pytest.mark.parametrize("sizes", [(1, 2, 128, 1, 4), (1, 2, 16, 1, 65)], ids=["Dh", "Q"])
def test_sizes_that_triton_leaves_to_torch(sizes):
    a = draw(*sizes)
    with pytest.raises(ValueError, match=r"Dh <= 64, Q <= 64 .* for triton, got D"):
        adaln_cross_attention(**a, implementation="triton")
    torch.testing.assert_close(adaln_cross_attention(**a), adaln_cross_attention_ref(**a))
    wide = {n: t.double() if i < 9 else t for i, (n, t) in enumerate(a.items())}
    with pytest.raises(UnavailableError, match=r"triton: takes torch\.float32"):
        adaln_cross_attention(**draw(1, 2, 16, 1, 4, torch.float64), implementation="triton")
    assert adaln_cross_attention(**wide).dtype == torch.float64


def test_wrong_projections_are_named():
    values = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"proj_weight \[8, 8\], got \[8, 7\]"):
        absorb_output(values, torch.ones(8, 7))
    with pytest.raises(ValueError, match=r"values \[B, H, Q, Dh\], got \[2, 3, 4\]"):
        absorb_output(values[0], torch.ones(8, 8))
    with pytest.raises(TypeError, match=r"proj_weight in one of .*, got torch.int64"):
        absorb_output(values, torch.ones(8, 8).long())
