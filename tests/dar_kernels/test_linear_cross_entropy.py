"""linear_cross_entropy against fp64, and that the logits are never there as a whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from truth import DEVICE, DTYPES, TRITON, check_against_truth, relative_error

from dar_kernels import linear_cross_entropy_backward as backward
from dar_kernels import native
from dar_kernels.linear_cross_entropy import (
    _linear_cross_entropy,
    _linear_cross_entropy_summed,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)

NATIVE = DEVICE == "cpu" and native.missing() is None
WAYS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="no Triton")),
    pytest.param("native", marks=pytest.mark.skipif(not NATIVE, reason=str(native.missing()))),
]
SHAPES = {
    "one-row": (1, 64, 100),
    "odd": (130, 33, 301),
    "one-code": (3, 16, 1),
    "tiles": (257, 96, 520),
    "demo": (70, 256, 4096),
}


def make_inputs(M, D, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) / math.sqrt(D)
    targets = torch.randint(V, (M,), generator=generator)
    return [t.to(DEVICE) for t in (2 * x, weight, targets)]


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 rows, so that few rows are several."""
    monkeypatch.setattr(backward, "CHUNK", {"cuda": 1, "cpu": 1})


def plain_model(x, weight, targets):
    """The definition as the prior has it: the loss of low-precision logits is taken in fp32."""
    logits = x @ weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="none")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_less_accurate_than_torch(way, dtype, shape, small_chunks):
    if (way, dtype) == ("native", torch.float16):
        pytest.skip("not one of its dtypes")

    def ours(*inputs):
        return linear_cross_entropy(*inputs, reduction="none", implementation=way)

    check_against_truth(ours, plain_model, make_inputs(*SHAPES[shape]), dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignore_index", [None, -100, 3])
def test_reductions(way, reduction, ignore_index):
    x, weight, targets = make_inputs(40, 32, 50)
    if ignore_index is not None:
        targets[::3] = ignore_index
    options = {"reduction": reduction, "ignore_index": ignore_index}

    def run(fn, x, weight, targets):
        x, weight = x.requires_grad_(), weight.requires_grad_()
        loss = fn(x, weight, targets)
        return loss, *torch.autograd.grad(loss, (x, weight))

    actual = run(
        lambda *a: linear_cross_entropy(*a, **options, implementation=way),
        x.clone(), weight.clone(), targets,
    )  # fmt: skip
    given = {k: v for k, v in options.items() if v is not None}
    expected = run(
        lambda x, w, t: F.cross_entropy(x @ w.T, t, **given), x.double(), weight.double(), targets
    )
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_extreme_logits_and_strides(way):
    """Logits of thousands; rows and columns of wider matrices; a transposed weight."""
    x, weight, targets = make_inputs(20, 48, 30)
    x = F.pad(300 * x, (3, 5))[:, 3:51]
    weight = weight.T.contiguous().T
    targets = torch.stack((targets, targets), 1)[:, 0]
    options = {"reduction": "none", "implementation": way}
    loss = linear_cross_entropy(x, weight, targets, **options)
    expected = linear_cross_entropy_ref(x.double(), weight.double(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-3)
    certain = targets * 0 + (x @ weight.T).argmax(-1)
    assert (linear_cross_entropy(x, weight, certain, **options) >= 0).all()
    step = x.clone().requires_grad_()
    linear_cross_entropy(step, weight, targets, implementation=way).backward()
    assert step.grad.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    x, weight, targets = (t[:0] if i != 1 else t for i, t in enumerate(make_inputs(2, 16, 8)))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, targets, reduction="sum", implementation=way)
    loss.backward()
    assert loss == 0
    assert not weight.grad.any()


@pytest.mark.parametrize("way", WAYS)
def test_rows_do_not_depend_on_chunks(way, monkeypatch):
    x, weight, targets = make_inputs(300, 32, 64)

    def run():
        leaf = x.clone().requires_grad_()
        loss = linear_cross_entropy(leaf, weight, targets, reduction="none", implementation=way)
        return loss, *torch.autograd.grad(loss.sum(), leaf)

    whole = run()
    monkeypatch.setattr(backward, "CHUNK", {"cuda": 1, "cpu": 1})
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradcheck(small_chunks):
    x, weight, targets = make_inputs(130, 2, 3)
    leaves = x.double().requires_grad_(), weight.double().requires_grad_()
    for reduction in ("mean", "none"):
        torch.autograd.gradcheck(
            lambda x, w, r=reduction: linear_cross_entropy(
                x, w, targets, reduction=r, ignore_index=0, implementation="torch"
            ),
            leaves,
            fast_mode=True,
        )


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_that_of_linear(way):
    x, weight, targets = make_inputs(24, 32, 40)
    layer = torch.nn.Linear(32, 40, bias=False, device=DEVICE)
    with torch.no_grad():
        layer.weight.copy_(weight)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        low = x.to(torch.bfloat16).requires_grad_()
        loss = linear_cross_entropy(low, layer.weight, targets, implementation=way)
        reference = F.cross_entropy(layer(x).float(), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference, rtol=1e-2, atol=1e-2)
    loss.backward()
    assert low.grad.dtype == torch.bfloat16
    ours, layer.weight.grad = layer.weight.grad, None
    reference.backward()
    assert ours.dtype == torch.float32
    error = (ours - layer.weight.grad).norm() / layer.weight.grad.norm()
    assert error < 2e-2


def largest_allocation(fn):
    """Bytes of the largest block that `fn` takes at once, inside opaque operators too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        fn()
    return max(event.self_cpu_memory_usage for event in recorded.events())


@pytest.mark.skipif(DEVICE == "cuda", reason="what is measured is the CPU's memory")
def test_memory_is_that_of_a_chunk(small_chunks):
    M, D, V = 2048, 4, 512
    x, weight, targets = make_inputs(M, D, V)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    saved = []
    pack = lambda tensor: saved.append(tensor.numel()) or tensor  # noqa: E731

    def step():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            linear_cross_entropy(x, weight, targets, implementation="torch").backward()

    assert 4 * 128 * V <= largest_allocation(step) <= 4 * M * V // 16
    assert max(saved) <= M * D
    plain = largest_allocation(lambda: F.cross_entropy(x @ weight.T, targets).backward())
    assert plain == 4 * M * V  # so the measure sees it


@pytest.mark.parametrize("way", WAYS)
def test_registration(way):
    x, weight, targets = make_inputs(5, 16, 20)
    leaves = x.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(_linear_cross_entropy, (*leaves, targets, way))
    lse = torch.logsumexp(x @ weight.T, -1).detach()
    plain = x.detach(), weight.detach()
    torch.library.opcheck(
        backward.linear_cross_entropy_backward,
        (torch.ones(5, device=DEVICE), *plain, targets, lse, way),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_with_the_loss_are_those_of_the_rows(small_chunks, reduction):
    """A mean's gradients are made beside it, those of single losses in a backward pass."""
    x, weight, targets = make_inputs(300, 8, 40)
    results = []
    for rows_first in (False, True):
        leaves = x.double().requires_grad_(), weight.double().requires_grad_()
        how = {"ignore_index": 3, "implementation": "torch"}
        if rows_first:
            rows = linear_cross_entropy(*leaves, targets, reduction="none", **how)
            loss = rows.sum() / (1 if reduction == "sum" else (targets != 3).sum())
        else:
            loss = linear_cross_entropy(*leaves, targets, reduction=reduction, **how)
        results.append((loss.detach(), *torch.autograd.grad(loss * 0.7, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_registration_of_the_summed_loss():
    x, weight, targets = make_inputs(5, 16, 20)
    leaves = x.requires_grad_(), weight.requires_grad_()
    factors = torch.full((5,), 0.2, device=DEVICE)
    for way in ("torch", "native") if NATIVE else ("torch",):
        torch.library.opcheck(_linear_cross_entropy_summed, (*leaves, targets, factors, way))


@pytest.mark.parametrize("way", [*WAYS, None])
def test_compiles(way):
    def step(x, weight, targets):
        return linear_cross_entropy(x, weight, targets, ignore_index=-1, implementation=way)

    x, weight, targets = make_inputs(9, 16, 20)
    targets[2] = -1
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for fn in (step, compiled):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = fn(*leaves, targets)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_a_target_that_nobody_could_check_gives_nan(way):
    """As on a GPU, where it is not read back."""
    x, weight, targets = make_inputs(4, 16, 20)
    targets[1:3] = torch.tensor([-5, 20])
    loss, _ = _linear_cross_entropy(x, weight, targets, way)
    assert loss.isnan().tolist() == [False, True, True, False]


WRONG = {
    "x": ({"x": 3}, TypeError, "expected x a tensor, got int"),
    "x-dtype": ({"x": torch.ones(3, 8).long()}, TypeError, "expected x .*, got torch.int64"),
    "x-shape": ({"x": torch.ones(2, 3, 8)}, ValueError, r"x \[M, D >= 1\], got \[2, 3, 8\]"),
    "width": ({"weight": torch.ones(5, 7)}, ValueError, r"weight \[V >= 1, 8\], got \[5, 7\]"),
    "dtypes": ({"weight": torch.ones(5, 8).half()}, TypeError, "weight in torch.float32, got"),
    "targets": ({"targets": torch.ones(3)}, TypeError, "targets in torch.int64, got"),
    "rows": ({"targets": torch.ones(4).long()}, ValueError, r"targets \[3\], got \[4\]"),
    "range": ({"targets": torch.tensor([0, 5, 1])}, ValueError, r"targets in \[0, 5\), got 5"),
    "negative": ({"targets": torch.tensor([0, -100, 1])}, ValueError, r"\[0, 5\), got -100"),
    "empty": ({"weight": torch.ones(0, 8)}, ValueError, r"weight \[V >= 1, 8\], got \[0, 8\]"),
    "reduction": ({"reduction": "max"}, ValueError, "expected reduction one of .*, got 'max'"),
    "device": ({"weight": torch.ones(5, 8, device="meta")}, ValueError, "on cpu, got meta"),
    "name": ({"implementation": "cuda"}, ValueError, "one of triton, native, torch, got 'cuda'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    change, error, message = WRONG[case]
    arguments = {"x": torch.ones(3, 8), "weight": torch.ones(5, 8)}
    arguments["targets"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**(arguments | change))
