"""qkv_rope_append against its definition in fp64; with paged_attention it is causal attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pages import PAGE_DTYPES, pages_in
from truth import DEVICE, DTYPES, TRITON, check_against_truth, relative_error

from dar_kernels.paged_attention import paged_attention
from dar_kernels.pages import PAGE_SIZE, Pages, dequantise, new_pages, quantise
from dar_kernels.qkv_rope_append import OP, qkv_rope_append, qkv_rope_append_ref
from dar_kernels.qkv_rope_append_triton import qkv_rope_append_triton

EVERY = ["torch", *(["triton"] if TRITON else [])]
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tables(tokens, head_dim):
    """cos and sin of the prior's positions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    angles = torch.arange(tokens, dtype=torch.float32)[:, None] * 10_000.0**-exponents
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def fresh(num_pages, kv_heads, head_dim, dtype, fill=0.5):
    """Pages of one number, so that a write where none belongs shows."""
    pages = new_pages(num_pages, kv_heads, head_dim, dtype=dtype, device=DEVICE)
    for part in pages:
        if part is not None:
            part.fill_(2 if part.dtype == torch.int8 else fill)
    return pages


def plain(pages, dtype):
    return (
        dequantise(pages.keys, pages.key_scales, dtype),
        dequantise(pages.values, pages.value_scales, dtype),
    )


def check(heads, kv_heads, head_dim, dtype, page_dtype, implementation, positions=(0, 63, 40, -1)):
    cos, sin = tables(64, head_dim)
    table = integers([[3, -1], [-9, 5], [0, 1], [9, 9]])[: len(positions)]
    at = integers(positions)
    qkv = torch.randn(len(positions), (heads + 2 * kv_heads) * head_dim).to(DEVICE, dtype)

    def reference(qkv):
        pages = pages_in(fresh(7, kv_heads, head_dim, page_dtype or dtype), qkv.dtype)
        q = qkv_rope_append_ref(qkv, cos, sin, at, pages, table, heads, kv_heads)
        return q, *plain(pages, qkv.dtype)

    def ours(qkv):
        pages = fresh(7, kv_heads, head_dim, page_dtype or dtype)
        q = qkv_rope_append(
            qkv, cos, sin, at, pages, table,
            heads=heads, kv_heads=kv_heads, implementation=implementation,
        )  # fmt: skip
        return q, *plain(pages, torch.float64)

    check_against_truth(ours, reference, [qkv], dtype, gradients=False)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (32, 32, 100), (8, 1, 128)], ids=str
)
def test_no_less_accurate_than_torch(heads, kv_heads, head_dim, dtype, page_dtype, implementation):
    check(heads, kv_heads, head_dim, dtype, page_dtype, implementation)


@given(
    kv_heads=st.integers(1, 5), group=st.integers(1, 4), half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), page_dtype=st.sampled_from(PAGE_DTYPES),
    implementation=st.sampled_from(EVERY), position=st.integers(0, 63),
)  # fmt: skip
@settings(max_examples=20)
def test_any_shape(kv_heads, group, half, dtype, page_dtype, implementation, position):
    heads = kv_heads * group
    check(heads, kv_heads, 2 * half, dtype, page_dtype, implementation, (position % 32, 63))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_writes_its_slots_and_no_others(page_dtype, implementation):
    heads, kv_heads, head_dim = 4, 2, 64
    cos, sin = tables(96, head_dim)
    table = integers([[1, 4, -1], [2, -1, -1], [0, 0, 0], [5, 3, 6]])
    for positions in ([33, 31, -1, 64], [-1, -1, -1, -1]):
        pages = fresh(8, kv_heads, head_dim, page_dtype or torch.float32)
        qkv = torch.randn(4, 8 * head_dim, device=DEVICE) + 3
        q = qkv_rope_append(
            qkv, cos, sin, integers(positions), pages, table,
            heads=heads, kv_heads=kv_heads, implementation=implementation,
        )  # fmt: skip
        before = plain(fresh(8, kv_heads, head_dim, page_dtype or torch.float32), torch.float64)
        slots = {(int(table[r, p // 32]), p % 32) for r, p in enumerate(positions) if p >= 0}
        for old, new in zip(before, plain(pages, torch.float64), strict=True):
            changed = (old != new).any(-1)  # [pages, Hkv, 32]
            assert {(i, s) for i, _, s in changed.nonzero().tolist()} == slots
            assert changed.sum() == kv_heads * len(slots)
        idle = integers(positions) < 0
        assert not q[idle].any()
        assert q[~idle].any(-1).all()


@needs_triton
def test_kernel_leaves_rows_alone_that_have_no_page():
    cos, sin = tables(64, 64)
    table = integers([[-1, 0], [8, 0], [0, 0], [0, 1]])
    for append in (qkv_rope_append_triton, OP.implementations[1].run):
        pages = fresh(8, 2, 64, torch.float32)
        qkv = torch.randn(4, 8 * 64, device=DEVICE)
        at = integers([3, 3, 64, 40])  # no page, no page, past the tables, good
        q = append(qkv, cos, sin, at, *pages, table, 4, 2)
        assert not q[:3].any()
        assert q[3].any()
        changed = (pages.keys != 0.5).any(-1).nonzero().tolist()
        assert changed == [[1, 0, 8], [1, 1, 8]]


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes_are_those_of_quantise(page_dtype, dtype, implementation):
    """Values are only rounded: codes and scales are equal to the bit, over 30 orders of size."""
    cos, sin = tables(32, 64)
    sizes = 10.0 ** torch.linspace(-25, 8, 32)[:, None]
    qkv = (torch.randn(32, 3 * 64) * sizes * torch.rand(32, 192) ** 4).to(DEVICE, dtype)
    qkv[5] = 0
    pages = new_pages(32, 1, 64, dtype=page_dtype, device=DEVICE)
    table = torch.arange(32, dtype=torch.int32, device=DEVICE)[:, None]
    qkv_rope_append(
        qkv, cos, sin, integers([7] * 32), pages, table,
        heads=1, kv_heads=1, implementation=implementation,
    )  # fmt: skip
    codes, scales = quantise(qkv[:, 128:], page_dtype)
    assert torch.equal(pages.value_scales[:, 0, 7], scales)
    assert torch.equal(pages.values[:, 0, 7].view(torch.uint8), codes.view(torch.uint8))
    error = dequantise(codes, scales, torch.float32) - qkv[:, 128:].float()
    bound = scales / 2 if page_dtype == torch.int8 else scales * 16
    assert (error.abs().amax(1) <= bound * 1.001).all()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize(
    ("page_dtype", "bound"),
    [(None, 1e-6), (torch.int8, 1e-2), (torch.float8_e4m3fn, 5e-2)],
    ids=str,
)
def test_appending_and_attending_is_causal_attention(page_dtype, bound, implementation):
    heads, kv_heads, head_dim, tokens, rows = 2, 1, 32, 34, 2
    cos, sin = tables(tokens, head_dim)
    pages = new_pages(4, kv_heads, head_dim, dtype=page_dtype or torch.float32, device=DEVICE)
    table = integers([[2, 0], [3, 1]])
    qkv = torch.randn(tokens, rows, (heads + 2 * kv_heads) * head_dim, device=DEVICE)
    outs = []
    for first, last in ((0, 30), (30, 31), (31, 32), (32, 33), (33, tokens)):  # a prompt, then rows
        n = last - first
        at = integers([*range(first, last)]).repeat_interleave(rows)
        q = qkv_rope_append(
            qkv[first:last].flatten(0, 1), cos, sin, at, pages, table.repeat(n, 1),
            heads=heads, kv_heads=kv_heads, implementation=implementation,
        )[-rows:]  # fmt: skip
        lengths = integers([last] * rows)
        outs.append(paged_attention(q, pages, table, lengths, implementation=implementation))
    ours = torch.stack(outs, 2)  # [R, H, 5, Dh]

    x = qkv.double().unflatten(-1, (-1, head_dim)).permute(1, 2, 0, 3)  # [R, H + 2·Hkv, N, Dh]
    pairs = torch.view_as_complex(x[:, : heads + kv_heads].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2)
    truth = torch.nn.functional.scaled_dot_product_attention(
        turned[:, :heads], turned[:, heads:], x[:, heads + kv_heads :], is_causal=True,
        enable_gqa=True,
    )[:, :, -len(outs) :]  # fmt: skip
    assert relative_error(ours, truth) < bound


@needs_triton
def test_strides():
    cos, sin = tables(64, 64)
    table, at = integers([[1, 0], [2, 3]]), integers([32, 5])
    qkv = torch.randn(2, 2 * 6 * 64, device=DEVICE)[:, ::2]
    kv = torch.zeros(4, 2, 2, PAGE_SIZE, 64, device=DEVICE)
    pages, plain_pages = Pages(*kv.unbind(1)), new_pages(4, 2, 64, dtype=kv.dtype, device=DEVICE)
    options = {"heads": 2, "kv_heads": 2}
    q = qkv_rope_append(qkv, cos, sin, at, pages, table, **options, implementation="triton")
    same = qkv_rope_append(
        qkv.contiguous(), cos, sin, at, plain_pages, table, **options, implementation="torch"
    )
    torch.testing.assert_close(q, same)
    torch.testing.assert_close(kv, torch.stack(plain_pages[:2], 1))


@needs_triton
@pytest.mark.parametrize("page_dtype", [None, torch.int8], ids=str)  # opcheck adds up its inputs
def test_registration(page_dtype):
    cos, sin = tables(64, 32)
    pages = new_pages(4, 1, 32, dtype=page_dtype or torch.float32, device=DEVICE)
    qkv, table = torch.randn(2, 4 * 32, device=DEVICE), integers([[0, 1], [2, 3]])
    torch.library.opcheck(
        qkv_rope_append_triton, (qkv, cos, sin, integers([40, 3]), *pages, table, 2, 1)
    )


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_compiles_whole(page_dtype, implementation):
    cos, sin = tables(64, 32)
    table, at = integers([[0, 1], [2, 3]]), integers([40, 3])
    qkv = torch.randn(2, 4 * 32, device=DEVICE)

    def step(qkv, pages):
        q = qkv_rope_append(
            qkv, cos, sin, at, pages, table, heads=2, kv_heads=1, implementation=implementation
        )
        return paged_attention(q, pages, table, at + 1, implementation=implementation)

    eager, compiled = (fresh(4, 1, 32, page_dtype or torch.float32) for _ in range(2))
    expected = step(qkv, eager)
    out = torch.compile(step, fullgraph=True, backend="aot_eager")(qkv, compiled)
    torch.testing.assert_close(out, expected)
    for a, b in zip(plain(compiled, torch.float64), plain(eager, torch.float64), strict=True):
        torch.testing.assert_close(a, b)


def test_no_rows_and_fp64():
    cos, sin = tables(32, 8)
    pages = new_pages(1, 1, 8, dtype=torch.float64, device=DEVICE)
    qkv = torch.randn(1, 32, dtype=torch.float64, device=DEVICE)
    options = {"heads": 2, "kv_heads": 1}
    q = qkv_rope_append(qkv, cos, sin, integers([0]), pages, integers([[0]]), **options)
    assert torch.equal(q.flatten(), qkv[0, :16])  # no rotation at position 0
    assert torch.equal(pages.values[0, 0, 0], qkv[0, 24:])
    none = integers([[0]])[:0]
    assert qkv_rope_append(qkv[:0], cos, sin, none[:, 0], pages, none, **options).shape == (0, 2, 8)


@pytest.mark.parametrize("implementation", EVERY)
def test_keeps_no_graph(implementation):
    cos, sin = tables(32, 8)
    pages = new_pages(1, 1, 8, dtype=torch.float32, device=DEVICE)
    table, at = integers([[0]]), integers([0])
    qkv = torch.randn(1, 32, device=DEVICE, requires_grad=True)
    options = {"heads": 2, "kv_heads": 1, "implementation": implementation}
    q = qkv_rope_append(qkv, cos, sin, at, pages, table, **options)
    out = paged_attention(
        q.detach().requires_grad_(), pages, table, at + 1, implementation=implementation
    )
    assert not any(t.requires_grad for t in (q, pages.keys, pages.values, out))


def test_errors():
    cos, sin = tables(64, 32)
    pages = new_pages(4, 1, 32, dtype=torch.float32, device=DEVICE)
    good = {
        "qkv": torch.randn(2, 4 * 32, device=DEVICE), "cos": cos, "sin": sin,
        "positions": integers([40, 3]), "pages": pages,
        "block_table": integers([[0, 1], [2, 3]]), "heads": 2, "kv_heads": 1,
    }  # fmt: skip

    def error(kind, match, **changed):
        with pytest.raises(kind, match=r"qkv_rope_append: expected " + match):
            qkv_rope_append(**(good | changed))

    error(TypeError, "qkv a tensor, got NoneType", qkv=None)
    error(TypeError, "qkv in one of .*, got torch.int32", qkv=good["qkv"].int())
    error(ValueError, "heads a multiple of kv_heads, got 3 and 2", heads=3, kv_heads=2)
    error(ValueError, r"qkv \[R, 4·Dh\] with Dh even .* got \[2, 127\]", qkv=good["qkv"][:, 1:])
    error(ValueError, r"qkv \[R, 4·Dh\] with Dh even .* got \[2, 4\]", qkv=good["qkv"][:, :4])
    error(ValueError, r"keys \[num_pages >= 1, 2, 32, 32\]", qkv=torch.zeros(2, 192), kv_heads=2)
    error(TypeError, "keys in one of .*16, .*int8, .*float8_e4m3fn, got", qkv=good["qkv"].half())
    error(TypeError, "positions in torch.int32", positions=good["positions"].long())
    error(ValueError, r"block_table \[2, max_pages >= 1\]", block_table=good["positions"])
    error(TypeError, "cos a tensor, got float", cos=1.0)
    error(TypeError, "sin in torch.float32, got torch.float64", sin=sin.double())
    error(ValueError, r"sin \[64, 16\], got \[63, 16\]", sin=sin[1:])
    error(ValueError, r"cos \[N >= 1, 16\], got \[64, 8\]", cos=cos[:, :8])
    error(ValueError, "sin on .*, got meta", sin=sin.to("meta"))
    with pytest.raises(TypeError, match=r"new_pages: expected dtype one of .*, got torch.int16"):
        new_pages(1, 1, 2, dtype=torch.int16, device="cpu")


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read back")
def test_values_out_of_range_are_named():
    cos, sin = tables(60, 32)
    pages = new_pages(4, 1, 32, dtype=torch.float32, device="cpu")
    qkv, table = torch.randn(2, 4 * 32), integers([[0, 1], [2, 4]])
    for position in (-2, 60):
        with pytest.raises(ValueError, match=rf"positions -1 or in \[0, 60\), got {position}$"):
            qkv_rope_append(
                qkv, cos, sin, integers([0, position]), pages, table, heads=2, kv_heads=1
            )
    with pytest.raises(ValueError, match=r"block_table\[1, 1\] in \[0, 4\), got 4$"):
        qkv_rope_append(qkv, cos, sin, integers([0, 32]), pages, table, heads=2, kv_heads=1)
