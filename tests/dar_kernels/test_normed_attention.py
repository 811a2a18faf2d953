"""normed_attention against its definition in fp64, in every implementation."""

import functools
import importlib

import pytest
import torch
from truth import DEVICE, DTYPES, EPS, TRITON, check_against_truth, relative_error

from dar_kernels import UnavailableError, prefer
from dar_kernels.normed_attention import (
    OP,
    _normed_attention,
    normed_attention,
    normed_attention_ref,
)

module = importlib.import_module("dar_kernels.normed_attention")  # a function hides its name
NATIVE = OP.implementations[1].missing() is None
native_only = pytest.mark.skipif(not NATIVE, reason="no AVX-512 BF16 or no extension here")
WAYS = ["torch", *["triton"] * TRITON]


def inputs(B, N, H, Dh, tables=True, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(B, N, 3 * H * Dh, generator=generator).chunk(3, -1)
    norms = [1 + 0.3 * torch.randn(Dh, generator=generator) for _ in range(4)]
    angles = 10 * torch.randn(N, Dh // 2, generator=generator, dtype=torch.float64)
    rotation = [angles.cos().float(), angles.sin().float()] if tables else [None, None]
    return [x if x is None else x.to(device) for x in (q, k, v, *norms, *rotation)]


def with_tables(function, tables, **options):
    """The function of the floating-point inputs: tables stay in fp32."""

    def run(*tensors):
        return function(*tensors, *tables, **options)

    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "H", "Dh", "tables"),
    [(2, 21, 3, 16, True), (1, 1, 2, 64, True), (1, 33, 1, 6, False)],
    ids=str,
)
def test_no_less_accurate_than_torch(way, dtype, B, N, H, Dh, tables):
    """Gradients but for one key, or unrotated ones: then some of them are zero but for rounding."""
    *tensors, cos, sin = inputs(B, N, H, Dh, tables)
    check_against_truth(
        with_tables(normed_attention, (cos, sin), implementation=way),
        with_tables(normed_attention_ref, (cos, sin)),
        tensors,
        dtype,
        gradients=N > 1 and tables,
    )


@native_only
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("B", "N", "H", "Dh"),
    [(1, 1024, 2, 64), (2, 37, 3, 64), (1, 130, 2, 32), (3, 1, 1, 16), (1, 257, 1, 64)],
    ids=str,
)
def test_native_no_less_accurate_than_torch(B, N, H, Dh, threads):
    *tensors, cos, sin = inputs(B, N, H, Dh, device="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_against_truth(
            with_tables(normed_attention, (cos, sin), implementation="native"),
            with_tables(normed_attention_ref, (cos, sin)),
            tensors,
            torch.bfloat16,
            gradients=False,
        )
    finally:
        torch.set_num_threads(before)


@native_only
def test_native_takes_scores_of_any_size():
    """Norm weights of 30 make scores of thousands: one key has all the weight."""
    q, k, v, *norms, cos, sin = inputs(1, 200, 2, 64, device="cpu")
    big = [(30 * w).bfloat16() if i % 2 == 0 else w.bfloat16() for i, w in enumerate(norms)]
    low = [x.bfloat16() for x in (q, k, v)]
    ours = normed_attention(*low, *big, cos, sin, implementation="native")
    truth = normed_attention_ref(*(x.double() for x in (*low, *big)), cos, sin)
    same = normed_attention(*low, *big, cos, sin, implementation="torch")
    assert ours.isfinite().all()
    assert relative_error(ours, truth) <= 2 * relative_error(same, truth) + EPS


@native_only
def test_threads_change_nothing():
    tensors = [x.bfloat16() for x in inputs(2, 300, 3, 64, device="cpu")[:7]]
    alone = normed_attention(*tensors, implementation="native")
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert torch.equal(normed_attention(*tensors, implementation="native"), alone)
    finally:
        torch.set_num_threads(before)


@native_only
def test_native_is_chosen_without_gradients_only():
    assert OP.pick("cpu", torch.bfloat16) == "native"
    assert OP.pick("cpu", torch.bfloat16, grad=True) == "torch"
    tensors = [x.bfloat16() for x in inputs(1, 5, 1, 16, device="cpu")[:7]]
    tensors[0].requires_grad_()
    assert normed_attention(*tensors).requires_grad
    with pytest.raises(UnavailableError, match="native: has no backward"):
        normed_attention(*tensors, implementation="native")


@pytest.mark.parametrize("prefix", [0, 1, 4, 8, 9])
def test_prefixes(prefix):
    *tensors, cos, sin = inputs(2, 9, 2, 16, device="cpu")
    truth = normed_attention_ref(*(x.double() for x in tensors), cos, sin, prefix)
    torch.testing.assert_close(normed_attention(*tensors, cos, sin, prefix=prefix), truth.float())


@native_only
def test_registration_and_compilation():
    tensors = [x.bfloat16() for x in inputs(1, 20, 2, 16, device="cpu")[:7]]
    torch.library.opcheck(_normed_attention, (*tensors, None, None))
    compiled = torch.compile(normed_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), normed_attention(*tensors))


def test_gradients_of_the_definition():
    *tensors, cos, sin = inputs(1, 4, 2, 4, device="cpu")
    leaves = [x.double().contiguous().requires_grad_() for x in tensors]
    run = functools.partial(normed_attention, cos=cos, sin=sin)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {0: torch.ones(1, 4, 32, dtype=torch.int64)},
            TypeError,
            r"expected q in one of .*, got torch.int64",
        ),
        ({1: torch.ones(1, 5, 32)}, ValueError, r"expected k \[1, 4, 32\], got \[1, 5, 32\]"),
        (
            {3: torch.ones(15)},
            ValueError,
            r"expected q_weight \[Dh\], Dh even and dividing 32, got \[15\]",
        ),
        ({4: torch.ones(8)}, ValueError, r"expected q_bias \[16\], got \[8\]"),
        ({7: None}, ValueError, "expected cos and sin, or neither"),
        ({8: torch.ones(4, 7)}, ValueError, r"expected sin \[4, 8\], got \[4, 7\]"),
    ],
    ids=["dtype", "shape", "norm", "bias", "tables", "table"],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = inputs(1, 4, 2, 16, device="cpu")
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=f"normed_attention: {message}"):
        normed_attention(*arguments)


def test_native_with_a_prefix_is_an_error():
    arguments = [x.bfloat16() for x in inputs(1, 4, 2, 16, device="cpu")[:7]]
    with pytest.raises(ValueError, match=r"no prefix or autocast .* prefix 0"):
        normed_attention(*arguments, prefix=0, implementation="native")


@native_only
def test_a_named_attention_runs_within(monkeypatch):
    """Where a back end is named, the op with an attention of its own makes way for it."""

    def fused(*arguments):
        raise AssertionError("the native op ran")

    monkeypatch.setattr(module, "_compiled", fused)
    tensors = [x.bfloat16() for x in inputs(1, 20, 2, 16, device="cpu")[:7]]
    with torch.no_grad():
        with pytest.raises(AssertionError, match="the native op ran"):
            normed_attention(*tensors)
        with prefer("reference", op="attention"):
            y = normed_attention(*tensors)
        truth = normed_attention_ref(*(x.double() for x in tensors), None, None)
    assert relative_error(y, truth) < 2e-2
