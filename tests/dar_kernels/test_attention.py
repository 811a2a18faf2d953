"""attention: every back end that runs here against the definition in fp64, and who is chosen."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from truth import DEVICE, check_against_truth, relative_error

from dar_kernels import UnavailableError, attention
from dar_kernels import attention_backends as backends
from dar_kernels.attention import OP, attention_ref
from dar_kernels.attention_check import self_test
from dar_kernels.attention_parts import KINDS, by_parts, kind_of, parts

op = importlib.import_module("dar_kernels.attention")  # a function hides its name
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RUNS = [
    (i.name, dtype)
    for i, dtype in itertools.product(OP.implementations, DTYPES)
    if i.why_not(DEVICE, dtype, named=True, grad=True) is None
]
CALLS = {  # kind: queries, keys, prefix
    "full": (9, 21, None), "wide": (21, 9, None), "causal": (21, 21, 0), "corner": (5, 21, 3),
    "prefix": (21, 21, 13), "far": (15, 21, 9), "uneven": (70, 80, 64),
}  # fmt: skip


def inputs(queries, keys, heads=(4, 2), head_dim=16, dtype=torch.float32, device=DEVICE):
    """As projections give them: tokens before heads in memory."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = (queries, heads[0]), (keys, heads[1]), (keys, heads[1])
    return [
        torch.randn(2, *s, head_dim, generator=generator).transpose(1, 2).to(device, dtype)
        for s in shapes
    ]


def one_by_one(q, k, v, prefix):
    """The definition in words: each query over the keys that it sees, each head with its own."""
    share = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for h, i in itertools.product(range(q.shape[1]), range(q.shape[2])):
        position = k.shape[2] - q.shape[2] + i
        end = k.shape[2] if prefix is None else max(prefix, position + 1)
        keys, values = k[:, h // share, :end], v[:, h // share, :end]
        weights = ((q[:, h, i, None] * keys).sum(-1) / q.shape[-1] ** 0.5).softmax(-1)
        out[:, h, i] = (weights[..., None] * values).sum(1)
    return out


@pytest.mark.parametrize("call", CALLS)
def test_the_definition(call):
    *sizes, prefix = CALLS[call]
    q, k, v = inputs(*sizes, dtype=torch.float64, device="cpu")
    torch.testing.assert_close(attention_ref(q, k, v, prefix), one_by_one(q, k, v, prefix))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_no_less_accurate_than_the_definition(name, dtype, call):
    *sizes, prefix = CALLS[call]
    for heads in ((2, 2), (4, 2)):
        q, k, v = inputs(*sizes, heads)
        kind = kind_of(*sizes, prefix)
        described = 16, heads[0] != heads[1], kind
        why = OP.named(name).why_not(DEVICE, dtype, named=True, grad=True, call=described)
        if why is not None:
            with pytest.raises(UnavailableError, match="kind"):
                attention(*(x.to(dtype) for x in (q, k, v)), prefix=prefix, implementation=name)
            continue
        check_against_truth(
            lambda *x: attention(*x, prefix=prefix, implementation=name),
            lambda *x: attention_ref(*x, prefix),
            (q, k, v),
            dtype,
        )


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40), st.none() | st.integers(0, 50)).filter(
    lambda s: s[2] is None or s[0] <= s[1]
)


@given(SIZES)
def test_parts_are_the_mask(sizes):
    """Every query once, in order, over as many keys as it sees."""
    queries, keys, prefix = sizes
    found = []
    for part in parts(*sizes):
        n = part.stop - part.start
        assert n > 0 and (not part.causal or n <= part.keys)
        found += [part.keys - n + 1 + i if part.causal else part.keys for i in range(n)]
    past = keys - queries
    assert found == [keys if prefix is None else min(keys, max(prefix, past + i + 1))
                     for i in range(queries)]  # fmt: skip
    assert kind_of(*sizes) in KINDS


@given(SIZES)
def test_parts_side_by_side(sizes):
    def kernel(q, k, v, causal):
        return backends.reference(q, k, v, 0 if causal else None)

    q, k, v = inputs(*sizes[:2], (2, 1), 4, torch.float64, "cpu")
    ours = by_parts(kernel)(q, k, v, sizes[2])
    torch.testing.assert_close(ours, attention_ref(q, k, v, sizes[2]))


@given(SIZES, st.sampled_from([n for n, dtype in RUNS if dtype == torch.float32]))
def test_any_sizes(sizes, name):
    q, k, v = inputs(*sizes[:2], head_dim=8)
    y = attention(q, k, v, prefix=sizes[2], implementation=name)
    truth = attention_ref(q.double(), k.double(), v.double(), sizes[2])
    assert relative_error(y, truth) < 1e-6


def test_a_prefix_of_all_keys_hides_none():
    q, k, v = inputs(9, 9)
    y = attention(q, k, v, prefix=9)
    assert torch.equal(y, attention(q, k, v))
    assert torch.equal(attention(q, k, v, prefix=12), y)


def test_gradients_of_the_definition():
    q, k, v = (x.requires_grad_() for x in inputs(5, 6, (2, 1), 4, torch.float64, "cpu"))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, prefix=3), (q, k, v))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph(dtype, call):
    *sizes, prefix = CALLS[call]
    torch.compiler.reset()
    q, k, v = (x.requires_grad_() for x in inputs(*sizes, dtype=dtype))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    results = []
    for run in (attention, compiled):
        y = run(q, k, v, prefix=prefix)
        results.append((y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))))
    torch.testing.assert_close(results[1], results[0])


def test_one_graph_for_many_lengths():
    """Where sizes are traced, a kind of call is a fact of the graph and a length is none."""
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=counter)
    for n in (30, 31, 47):
        q, k, v = inputs(n, n)
        torch.testing.assert_close(compiled(q, k, v, prefix=16), attention(q, k, v, prefix=16))
    assert counter.frame_count <= 2


def test_autocast_lowers_what_it_is_given():
    q, k, v = inputs(9, 9)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = attention(q, k.bfloat16(), v, prefix=0)
    assert y.dtype == torch.bfloat16
    low = [x.bfloat16().double() for x in (q, k, v)]
    assert relative_error(y, attention_ref(*low, 0)) < 1e-2


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({0: torch.ones(2, 9, 16)}, {}, ValueError, r"expected q \[B, H, Nq, Dh\]"),
        ({1: torch.ones(2, 2, 9, 8)}, {}, ValueError, r"expected k \[2, Hkv, .*, 16\]"),
        ({2: torch.ones(2, 2, 8, 16)}, {}, ValueError, r"expected v \[2, 2, 9, 16\]"),
        ({1: torch.ones(2, 2, 9, 16).half()}, {}, TypeError, "expected k in torch.float32"),
        ({1: torch.ones(2, 3, 9, 16), 2: torch.ones(2, 3, 9, 16)}, {}, ValueError,
         "expected heads of k that divide 4, got 3"),
        ({}, {"prefix": -1}, ValueError, "expected prefix >= 0, got -1"),
        ({}, {"prefix": True}, TypeError, "expected prefix an integer or None, got bool"),
        ({1: torch.ones(2, 2, 8, 16), 2: torch.ones(2, 2, 8, 16)}, {"prefix": 0}, ValueError,
         "expected no more queries than keys beside a prefix, got 9 and 8"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(change, options, error, message):
    arguments = inputs(9, 9, device="cpu")
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(error, match=f"attention: {message}"):
        attention(*arguments, **options)


def test_self_test_of_those_that_run_here():
    for name, dtype in RUNS:
        if dtype != torch.float16:
            found = self_test(name, DEVICE, dtype)
            assert found.passed and found.cases >= 30, found
    for name in ("sdpa-cudnn", "flash-attn"):
        if name not in dict(RUNS):
            found = self_test(name, "cpu")
            assert not found.passed and found.error == "runs on cuda only"
    with pytest.raises(ValueError, match="expected implementation one of"):
        self_test("fast")


def test_self_test_finds_what_is_wrong(monkeypatch):
    def top_left(q, k, v, prefix):
        return backends.reference(q, k, v, None if prefix is None else 0)

    monkeypatch.setitem(op._RUN, "reference", top_left)
    found = self_test("reference", "cpu", torch.float32)
    assert found.worst > 0.01 and not found.passed and "prefix" in found.case
    monkeypatch.setitem(op._RUN, "reference", lambda q, k, v, prefix: q * torch.nan)
    assert not self_test("reference", "cpu").passed

    def refuses(q, k, v, prefix):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(op._RUN, "reference", refuses)
    found = self_test("reference", "cpu")
    assert found.error == "RuntimeError: no kernel image" and not found.passed
