"""attention_native against its definition in fp64: no less accurate than torch in bf16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from truth import check_against_truth

from dar_kernels import attention_native as module
from dar_kernels.attention_native import HEAD_DIMS, attention_native

pytestmark = pytest.mark.skipif(
    module.missing() is not None, reason="no AVX-512 BF16 or no extension here"
)


def seen(Nq, Nk, prefix):
    position = torch.arange(Nk - Nq, Nk)[:, None]
    return torch.arange(Nk) < (position + 1).clamp(min=Nk if prefix is None else prefix)


def reference(q, k, v, prefix):
    """The definition, by torch in whatever dtype: in bf16 the flash kernel's own accuracy."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, seen(q.shape[2], k.shape[2], prefix))


def inputs(B, H, KV, Nq, Nk, Dh, layout="tokens", size=1.0, seed=0):
    """q, k, v as `layout` has them in memory: tokens [B, N, H, Dh], heads [B, H, N, Dh], or rows of
    one projection."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, Nk, H + 2 * KV, Dh)
    q, k, v = torch.randn(shape, generator=generator).bfloat16().split([H, KV, KV], 2)
    q, k, v = (x.transpose(1, 2) for x in (q[:, Nk - Nq :] * size, k, v))
    if layout == "heads":
        return [x.contiguous() for x in (q, k, v)]
    if layout == "tokens":
        return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    return [q, k, v]


def check(prefix, tensors):
    check_against_truth(
        lambda q, k, v: attention_native(q, k, v, prefix),
        lambda q, k, v: reference(q, k, v, prefix),
        tensors,
        torch.bfloat16,
        gradients=tensors[1].shape[2] > 1,  # over one key some are zero but for rounding
    )


@pytest.mark.parametrize(
    ("B", "H", "KV", "Nq", "Nk", "Dh", "prefix"),
    [
        (1, 1, 1, 1, 1, 64, None),
        (1, 1, 1, 1, 130, 32, 0),
        (2, 2, 2, 5, 5, 16, 0),
        (1, 3, 1, 17, 17, 48, None),
        (1, 2, 1, 100, 100, 32, 0),
        (1, 1, 1, 129, 129, 64, None),
        (1, 2, 2, 257, 257, 64, 0),
        (1, 4, 2, 64, 128, 64, 64),
        (1, 1, 1, 70, 200, 128, 131),
        (1, 1, 1, 33, 190, 112, 20),
        (1, 1, 1, 40, 60, 64, 60),
    ],
    ids=str,
)
def test_no_less_accurate_than_torch(B, H, KV, Nq, Nk, Dh, prefix):
    check(prefix, inputs(B, H, KV, Nq, Nk, Dh))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_order_and_size(data):
    KV, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    Nk = data.draw(st.integers(2, 200))
    Nq = data.draw(st.integers(1, Nk))
    prefix = data.draw(st.none() | st.integers(0, Nk + 3))
    layout = data.draw(st.sampled_from(["tokens", "heads", "joint"]))
    size = data.draw(st.sampled_from([0.0, 1.0, 2.0]))
    Dh, seed = data.draw(st.sampled_from(HEAD_DIMS)), data.draw(st.integers(0, 99))
    B = 1 + 64 // Nq  # the error of a single row is luck
    check(prefix, inputs(B, KV * group, KV, Nq, Nk, Dh, layout, size, seed))


@pytest.mark.parametrize(("size", "Dh"), [(30.0, 64), (300.0, 32), (3e4, 128)], ids=str)
def test_scores_of_any_size(size, Dh):
    """One key has nearly all the weight; over many rows, as the noise of single ones is luck."""
    check(None, inputs(1, 2, 2, 200, 230, Dh, size=size))
    check(0, inputs(1, 2, 2, 200, 230, Dh, size=size))


@pytest.mark.parametrize("rising", [False, True])
def test_scores_that_grow_along_the_keys(rising):
    """The score that weighs 1 is left behind by more than 2^64, within a block and after it."""
    q, k, v = inputs(1, 1, 1, 70, 400, 64)
    growth = torch.arange(400)[:, None] * (4.0 if rising else -4.0)
    k = (q[:, :, :1].sign() * growth / 8).bfloat16() + k
    q = q.sign().abs() * q[:, :, :1].sign()
    check(None, [q, k, v])
    check(0, [q, k, v])


def test_output_and_gradients_lie_as_tokens():
    tensors = [x.requires_grad_() for x in inputs(2, 4, 2, 9, 12, 32)]
    y = attention_native(*tensors, 3)
    assert y.shape == (2, 4, 9, 32)
    gradients = torch.autograd.grad(y, tensors, torch.ones_like(y))
    for x, like in zip((y, *gradients), (tensors[0], *tensors), strict=True):
        assert x.shape == like.shape
        assert x.transpose(1, 2).is_contiguous()


def test_unaligned_rows_and_any_upstream_gradient():
    """Rows that start at any byte pair, sliced heads, and an expanded gradient."""
    storage = torch.randn(1, 30, 3 * 2 * 32 + 7).bfloat16()
    q, k, v = storage[..., 3:195].unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    dense = [x.contiguous().requires_grad_() for x in (q, k, v)]
    views = [x.detach().requires_grad_() for x in (q, k, v)]
    dout = torch.randn(()).bfloat16().expand(1, 2, 30, 32)
    y, same = attention_native(*views, 0), attention_native(*dense, 0)
    assert torch.equal(y, same)
    ours = torch.autograd.grad(y, views, dout)
    for a, b in zip(ours, torch.autograd.grad(same, dense, dout.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_a_last_dimension_that_is_not_contiguous_is_copied():
    q, k, v = inputs(1, 2, 2, 10, 10, 32)
    turned = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(attention_native(*turned), attention_native(q, k, v))


def test_threads_change_nothing():
    tensors = [x.requires_grad_() for x in inputs(1, 6, 3, 130, 290, 64)]

    def run():
        y = attention_native(*tensors, 70)
        return y, *torch.autograd.grad(y, tensors, tensors[0].detach())

    before, alone = torch.get_num_threads(), run()
    torch.set_num_threads(5)
    try:
        for ours, same in zip(run(), alone, strict=True):
            assert torch.equal(ours, same)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("where", [0, 1, 2], ids=["q", "k", "v"])
def test_nan_reaches_what_depends_on_it(where):
    tensors = inputs(1, 1, 1, 80, 80, 32)
    tensors[where][0, 0, 50, 3] = torch.nan
    leaves = [x.requires_grad_() for x in tensors]
    y = attention_native(*leaves, 0)
    after = y[0, 0, 50] if where == 0 else y[0, 0, 50:]
    if where < 2:  # a weight of zero does not hide a NaN value, as in torch
        assert y[0, 0, :50].isfinite().all()
    assert after.isnan().all() if where < 2 else after[..., 3].isnan().all()
    dq, dk, dv = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert dq[0, 0, 50].isnan().all()
    assert dk[0, 0, :50].isnan().all()
    assert dv[0, 0, :50].isnan().all() or where == 2


def test_keys_that_nobody_sees_get_no_gradient():
    tensors = [x.requires_grad_() for x in inputs(1, 1, 1, 1, 90, 32)]
    y = attention_native(*tensors, 0)
    _, dk, dv = torch.autograd.grad(y[:, :, :1], tensors, torch.ones(1, 1, 1, 32).bfloat16())
    assert dk.isfinite().all()
    assert dv[..., :90, :].count_nonzero() > 0
    q, k, v = inputs(1, 1, 1, 90, 90, 32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = attention_native(*leaves, 0)
    dout = torch.zeros_like(y)
    dout[:, :, :40] = 1
    _, dk, dv = torch.autograd.grad(y, leaves, dout)
    assert dk[:, :, 40:].count_nonzero() == 0
    assert dv[:, :, 40:].count_nonzero() == 0


@pytest.mark.parametrize("Nk", [0, 6])
def test_no_queries(Nk):
    q, k, v = (torch.zeros(2, 2, n, 16).bfloat16().requires_grad_() for n in (0, Nk, Nk))
    y = attention_native(q, k, v)
    assert y.shape == (2, 2, 0, 16)
    for gradient in torch.autograd.grad(y, (q, k, v), torch.zeros_like(y)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("prefix", [None, 7])
def test_registration(prefix):
    tensors = [x.requires_grad_() for x in inputs(1, 4, 2, 10, 20, 32)]
    torch.library.opcheck(module._attention_cpu, (*tensors, prefix))
    with torch.no_grad():
        out, lse = module._attention_cpu(*tensors, prefix)
    saved = [x.detach() for x in tensors]
    torch.library.opcheck(module._attention_cpu_backward, (out, *saved, out, lse, prefix))


def test_log_sum_exp():
    q, k, v = inputs(1, 2, 1, 50, 90, 64)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT / 8
    truth = scores.masked_fill(~seen(50, 90, 30), -torch.inf).logsumexp(-1)
    _, lse = module._attention_cpu(q, k, v, 30)
    torch.testing.assert_close(lse.double(), truth, rtol=0, atol=1e-4)


def test_compilation():
    tensors = [x.requires_grad_() for x in inputs(1, 2, 2, 20, 20, 32)]

    def run(q, k, v):
        return attention_native(q, k, v, 0).transpose(1, 2).flatten(2) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (run, compiled):
        y = fn(*tensors)
        results.append([y, *torch.autograd.grad(y, tensors, torch.ones_like(y))])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(1, 2, 4, 32)}, TypeError, "q in torch.bfloat16, got torch.float32"),
        ({"k": (1, 2, 3, 32)}, ValueError, r"k \[1, 1 <= Hkv <= 2, Nk >= 4, 32\], got \[1, 2, 3"),
        ({"v": (1, 2, 5, 32)}, ValueError, r"v \[1, 2, 4, 32\], got \[1, 2, 5, 32\]"),
        ({"q": (1, 2, 4, 24)}, ValueError, r"Dh one of \(16, .*, got 24"),
        (
            {"q": (1, 3, 4, 32), "k": (1, 2, 4, 32)},
            ValueError,
            "Hkv dividing 3, got 2",
        ),
        ({"prefix": -1}, ValueError, "prefix >= 0 or None, got -1"),
    ],
    ids=["dtype", "fewer keys", "value", "width", "heads", "prefix"],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = dict.fromkeys(("q", "k", "v"), (1, 2, 4, 32)) | {"prefix": None} | change
    for name, value in arguments.items():
        if isinstance(value, tuple):
            arguments[name] = torch.ones(value).bfloat16()
    with pytest.raises(error, match=f"attention_native: expected {message}"):
        attention_native(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.empty(1, 2, 5, 32)}, r"out \[1, 2, 4, 32\]"),
        ({"lse": torch.empty(1, 2, 3)}, r"lse \[B, H, Nq\]"),
        ({"prefix": -1}, "prefix >= 0"),
        ({"threads": 0}, "threads >= 1"),
    ],
    ids=str,
)
def test_the_extension_checks_what_it_is_given(change, message):
    from dar_kernels import _native

    x = torch.ones(1, 2, 4, 32).bfloat16()
    arguments = {"q": x, "k": x, "v": x, "out": x, "lse": torch.empty(1, 2, 4)}
    arguments |= {"prefix": 0, "threads": 1} | change
    arguments["out"] = arguments["out"].bfloat16()
    with pytest.raises(ValueError, match=message):
        _native.attention_train(**arguments)
