"""How the libraries are called: stand-ins of their functions, in PyTorch on the CPU.

Each has its library's signature (flash-attn 2.8, flash-attn-4 4.0.0b36, xformers 0.0.35), refuses
what the library refuses, and knows causal order from the bottom right corner only, as they do.
"""

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from dar_kernels import attention_backends as backends
from dar_kernels import attention_flash4
from dar_kernels.attention import OP, attention_ref

SIZES = {  # queries, keys, prefix, and the calls: queries, keys, causal
    "full": (9, 21, None, [(9, 21, False)]),
    "wide": (21, 9, None, [(21, 9, False)]),
    "causal": (21, 21, 0, [(21, 21, True)]),
    "corner": (5, 21, 3, [(5, 21, True)]),
    "prefix": (21, 21, 13, [(13, 13, False), (8, 21, True)]),
    "one query": (1, 21, 0, [(1, 21, False)]),
    "last of two": (14, 21, 20, [(13, 20, False), (1, 21, False)]),
}
HEADS = ((4, 4), (4, 2))


def by_tokens(q, k, v, scale, causal):
    """Attention of `[B, N, H, D]`, causal from the bottom right, by its own arithmetic."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert q.shape[2] % k.shape[2] == 0 and k.shape == v.shape
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if causal:
        i = torch.arange(q.shape[1])[:, None]
        j = torch.arange(k.shape[1])
        scores = scores.masked_fill(j > i + k.shape[1] - q.shape[1], -torch.inf)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)
    return out.contiguous(), scores.logsumexp(-1)


@pytest.fixture
def calls():
    return []


def module(name, monkeypatch, **contents):
    made = ModuleType(name)
    for key, value in contents.items():
        setattr(made, key, value)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def flash_attn(monkeypatch, calls):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and window_size == (-1, -1) and not return_attn_probs
        calls.append((q.shape[1], k.shape[1], causal))
        return by_tokens(q, k, v, softmax_scale, causal)[0]

    module("flash_attn", monkeypatch, flash_attn_func=flash_attn_func)


@pytest.fixture
def flash_attn_4(monkeypatch, calls):
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, **others
    ):
        assert qv is None and gather_kv_indices is None and not others
        calls.append((q.shape[1], k.shape[1], causal))
        return by_tokens(q, k, v, softmax_scale, causal)

    def forward(q, k, v, qv=None, *, softmax_scale=None, causal=False, return_lse=False):
        assert return_lse and not q.requires_grad
        calls.append((q.shape[1], k.shape[1], causal))
        return *by_tokens(q, k, v, softmax_scale, causal), None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0):
        assert dout.is_contiguous() and lse.shape == (len(q), q.shape[2], q.shape[1])
        share = q.shape[2] // k.shape[2]  # by hand: an op's own code is below autograd
        keys, values = (x.repeat_interleave(share, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, keys) * softmax_scale
        if causal:
            hidden = torch.ones_like(scores, dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores - lse[..., None]).exp()
        inner = torch.einsum("bihd,bjhd->bhij", dout, values)
        inner = weights * (inner - (dout * out).sum(-1).transpose(1, 2)[..., None]) * softmax_scale
        dq = torch.einsum("bhij,bjhd->bihd", inner, keys)
        dk = torch.einsum("bhij,bihd->bjhd", inner, q).unflatten(2, (-1, share)).sum(3)
        dv = torch.einsum("bhij,bihd->bjhd", weights, dout).unflatten(2, (-1, share)).sum(3)
        return dq, dk, dv

    module("flash_attn", monkeypatch)
    module("flash_attn.cute", monkeypatch, flash_attn_func=flash_attn_func)
    module(
        "flash_attn.cute.interface", monkeypatch, _flash_attn_fwd=forward, _flash_attn_bwd=backward
    )


@pytest.fixture
def xformers(monkeypatch, calls):
    class LowerTriangularFromBottomRightMask:
        pass

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        assert p == 0.0 and op is None and output_dtype is None
        assert query.shape[2:] == key.shape[2:], "it does not broadcast heads"
        assert attn_bias is None or type(attn_bias) is LowerTriangularFromBottomRightMask
        calls.append((query.shape[1], key.shape[1], attn_bias is not None))
        return by_tokens(query, key, value, scale, attn_bias is not None)[0]

    module("xformers", monkeypatch)
    module("xformers.ops", monkeypatch, memory_efficient_attention=memory_efficient_attention)
    module("xformers.ops.fmha", monkeypatch)
    module(
        "xformers.ops.fmha.attn_bias", monkeypatch,
        LowerTriangularFromBottomRightMask=LowerTriangularFromBottomRightMask,
    )  # fmt: skip


@pytest.fixture
def sdpa(monkeypatch, calls):
    """torch's own kernels: the public function for squares, its flash and efficient ops beside."""
    enabled = []

    @contextmanager
    def sdpa_kernel(backend):
        enabled.append(backend)
        yield
        enabled.pop()

    def public(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, enable_gqa=False):
        assert attn_mask is None and len(enabled) == 1
        assert not is_causal or q.shape[2] == k.shape[2], "refused on CUDA"
        assert enable_gqa == (q.shape[1] != k.shape[1])
        if enabled[0] == SDPBackend.EFFICIENT_ATTENTION:
            assert not enable_gqa, "has no grouped heads"
        calls.append((q.shape[2], k.shape[2], is_causal))
        y = by_tokens(*(x.transpose(1, 2) for x in (q, k, v)), q.shape[-1] ** -0.5, is_causal)[0]
        return y.transpose(1, 2)

    def corner(q, k, v):
        calls.append((q.shape[2], k.shape[2], True))
        y = by_tokens(*(x.transpose(1, 2) for x in (q, k, v)), q.shape[-1] ** -0.5, True)[0]
        return y.transpose(1, 2)

    monkeypatch.setattr(backends, "sdpa_kernel", sdpa_kernel)
    monkeypatch.setattr(backends.F, "scaled_dot_product_attention", public)
    for name in ("flash_op", "efficient_op"):
        monkeypatch.setattr(backends, name, corner)


LIBRARIES = {
    "flash-attn": "flash_attn", "flash-attn-4": "flash_attn_4", "xformers": "xformers",
    "sdpa-flash": "sdpa", "sdpa-efficient": "sdpa", "sdpa-cudnn": "sdpa",
}  # fmt: skip


@pytest.fixture(params=LIBRARIES)
def library(request):
    request.getfixturevalue(LIBRARIES[request.param])
    return OP.named(request.param)


def leaves(queries, keys, heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(queries)
    shapes = (queries, heads[0]), (keys, heads[1]), (keys, heads[1])
    return [
        torch.randn(2, *s, 16, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()
        for s in shapes
    ]


def outputs(run, inputs):
    y = run(*inputs)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y, *torch.autograd.grad(y, inputs, upstream)


def no_mask(*arguments):
    raise AssertionError("a dense mask was made")


@pytest.mark.parametrize("heads", HEADS, ids=["one to one", "grouped"])
@pytest.mark.parametrize("name", SIZES)
def test_layout_scale_and_alignment(library, calls, name, heads, monkeypatch):
    *sizes, prefix, expected_calls = SIZES[name]
    inputs = leaves(*sizes, heads)
    expected = outputs(lambda *x: attention_ref(*x, prefix), inputs)
    monkeypatch.setattr(backends, "seen", no_mask)
    torch.testing.assert_close(outputs(lambda *x: library.run(*x, prefix), inputs), expected)
    if library.name == "sdpa-cudnn":  # has no corner: it fills up the square
        expected_calls = [(m, m, c) if c else (n, m, c) for n, m, c in expected_calls]
    assert calls == expected_calls


def test_what_comes_back_lies_token_by_token(flash_attn):
    """So that heads beside each other, what the next product reads, are a view."""
    for name in ("full", "causal", "prefix"):
        *sizes, prefix, _ = SIZES[name]
        y = OP.named("flash-attn").run(*leaves(*sizes, (4, 2)), prefix)
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("name", "heads"), [("full", (4, 4)), ("causal", (4, 2)), ("prefix", (4, 2))], ids=str
)
def test_flash_attn_4_in_one_graph(flash_attn_4, calls, name, heads):
    *sizes, prefix, expected_calls = SIZES[name]
    inputs = leaves(*sizes, heads, torch.float32)
    torch.compiler.reset()
    run = OP.named("flash-attn-4").run
    compiled = torch.compile(lambda *x: run(*x, prefix), fullgraph=True, backend="aot_eager")
    expected = outputs(lambda *x: attention_ref(*x, prefix), inputs)
    torch.testing.assert_close(outputs(compiled, inputs), expected)
    assert calls == expected_calls


def test_registration_of_flash_attn_4(flash_attn_4):
    q, k, v = (x.detach().transpose(1, 2) for x in leaves(5, 9, (4, 2), torch.float32))
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(
        attention_flash4._flash_attention_4, (q, k, v, 0.25, True), test_utils=checks
    )


@pytest.mark.parametrize("op", ["flash_op", "efficient_op"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_torch_has_the_corner_ops(op, dtype):
    """Shapes and layout, forward and backward, without values: neither runs on a CPU."""
    q, k, v = (x.detach().to("meta", dtype).requires_grad_() for x in leaves(8, 20, (4, 4)))
    y = getattr(backends, op)(q, k, v)
    assert y.shape == q.shape and y.dtype == dtype and y.transpose(1, 2).is_contiguous()
    gradients = torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "kernel"),
    [
        (torch.bfloat16, 64, "sdpa-flash"),
        (torch.float32, 64, "sdpa-efficient"),
        (torch.float32, 12, "square"),
        (torch.float64, 64, "square"),
    ],
    ids=str,
)
def test_the_kernel_of_a_corner_on_cuda(dtype, head_dim, kernel, monkeypatch):
    """`sdpa` makes no mask there either."""
    ran = []
    monkeypatch.setattr(backends, "capability", lambda: (9, 0))
    monkeypatch.setattr("dar_kernels.dispatch.capability", lambda: (9, 0))
    monkeypatch.setattr(backends, "seen", no_mask)
    for name, key in (("_sdpa_flash", "sdpa-flash"), ("_sdpa_efficient", "sdpa-efficient"),
                      ("_sdpa_square", "square")):  # fmt: skip
        monkeypatch.setattr(backends, name, lambda *x, key=key: ran.append(key))
    shape = (1, 2, 5, head_dim)
    q = SimpleNamespace(shape=shape, device=SimpleNamespace(type="cuda"), dtype=dtype)
    k = SimpleNamespace(shape=(1, 2, 9, head_dim))
    backends._sdpa_any(q, k, k, True)
    assert ran == [kernel]


def test_torch_kernels_are_chosen_in_one_graph():
    """The context that picks a kernel, and the one of a corner, break no graph."""
    torch.compiler.reset()
    q, k, v = leaves(9, 9, (2, 2), torch.float32)

    def run(q, k, v):
        corner = backends._corner("cuda", q.dtype, q.shape[-1], False)
        return backends._sdpa_flash(q, k, v, True), corner

    y, corner = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    torch.testing.assert_close(y, attention_ref(q, k, v, 0))
    on_a_gpu = torch.cuda.is_available()
    assert corner == ("sdpa-efficient" if on_a_gpu else "")
