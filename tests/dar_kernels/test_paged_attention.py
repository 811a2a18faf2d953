"""paged_attention against its definition in fp64: every dtype of pages, group, split and shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_pages import PAGE_DTYPES, pages_in, random_case
from truth import DEVICE, DTYPES, TRITON, check_against_truth, relative_error

from dar_kernels.paged_attention import OP, paged_attention, paged_attention_ref
from dar_kernels.paged_attention_triton import paged_attention_triton, plan
from dar_kernels.pages import Pages, new_pages

EVERY = ["torch", *(["triton"] if TRITON else [])]
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


def check(case, implementation, scale=None):
    """The rule of truth.py; the pages are what they are, rounded or quantised, for everyone."""
    q, pages, table, lengths = case

    def reference(q):
        factor = q.shape[2] ** -0.5 if scale is None else scale
        return paged_attention_ref(q, pages_in(pages, q.dtype), table, lengths, factor)

    def ours(q):
        return paged_attention(q, pages, table, lengths, scale=scale, implementation=implementation)

    check_against_truth(ours, reference, [q], q.dtype, gradients=False)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(2, 2, 64), (4, 2, 100), (4, 1, 128), (8, 1, 64)], ids=str
)
def test_no_less_accurate_than_torch(heads, kv_heads, head_dim, dtype, page_dtype, implementation):
    case = random_case([1, 0, 77], heads, kv_heads, head_dim, dtype, page_dtype)
    check(case, implementation)


@needs_triton
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim"),
    [([256, 255], 16, 64), ([225], 8, 100), ([256], 8, 128), ([64], 4, 64)],
    ids=["L, guided", "heads of 3B", "heads of 7B, split", "demo"],
)
def test_presets(lengths, heads, head_dim):
    check(random_case(lengths, heads, heads, head_dim, torch.bfloat16, max_pages=8), "triton")


@pytest.mark.parametrize("implementation", EVERY)
def test_scores_of_any_size(implementation):
    case = random_case([40, 64], 4, 2, 64, torch.float32)
    for scale in (0.0, 1e-30, 30.0, -1.0):  # even weights; one token alone; the least alike first
        check(case, implementation, scale)


@pytest.mark.parametrize("implementation", EVERY)
def test_no_token_gives_zeros(implementation):
    q, pages, table, lengths = random_case([0, 0], 4, 1, 64, torch.float16)
    out = paged_attention(q, pages, table, lengths, implementation=implementation)
    assert torch.equal(out, torch.zeros_like(q))
    empty = [t[:0] for t in (q, table, lengths)]
    out = paged_attention(empty[0], pages, *empty[1:], implementation=implementation)
    assert out.shape == (0, 4, 64)


@needs_triton
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)], ids=str)
def test_splits_change_nothing(heads, kv_heads, page_dtype):
    case = random_case([161, 33, 0], heads, kv_heads, 64, torch.float16, page_dtype)
    scale = 0.125
    q, pages, table, lengths = case
    truth = paged_attention_ref(q.double(), pages_in(pages, torch.float64), table, lengths, scale)
    outs = [paged_attention_triton(q, *pages, table, lengths, scale, n) for n in (1, 2, 5, 8)]
    for out in outs:
        torch.testing.assert_close(out, outs[0], rtol=2e-3, atol=1e-3)
        assert relative_error(out, truth) < 1e-3
        assert not out[2].any()


@needs_triton
def test_splits_where_programs_are_few_and_shares_large():
    bf16 = torch.bfloat16
    assert plan(2, 16, 16, 64, 8, bf16, bf16).splits == 1  # 64 KiB a head: not worth a launch
    assert plan(2, 16, 16, 64, 128, bf16, bf16).splits == 9
    assert plan(64, 16, 16, 64, 128, bf16, bf16).splits == 1
    assert plan(1, 1, 1, 64, 10_000, bf16, bf16).splits == 32
    assert plan(2, 16, 4, 64, 8, bf16, bf16).grouped
    assert not plan(2, 16, 4, 64, 8, torch.float32, torch.float32).grouped


@needs_triton
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_kernels_pass_over_pages_and_tokens_that_do_not_exist(kv_heads):
    q, pages, table, _ = random_case([96, 96, 96], 4, kv_heads, 64, torch.float32)
    lengths = torch.tensor([96, 9999, -5], dtype=torch.int32, device=DEVICE)
    broken = table.clone()
    broken[0, 1], broken[0, 2] = -1, len(pages.keys)
    clamped = torch.tensor([32, 96, 0], dtype=torch.int32, device=DEVICE)
    expected = paged_attention_ref(q, pages, table, clamped, 0.125)
    for splits in (1, 3):
        out = paged_attention_triton(q, *pages, broken, lengths, 0.125, splits)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_strides(page_dtype, implementation):
    case = random_case([70, 12], 4, 2, 64, torch.float32, page_dtype)
    q, pages, table, lengths = case
    expected = paged_attention(*case, implementation=implementation)
    both = torch.stack(pages[:2], 1)  # keys and values side by side in one allocation
    scales = torch.stack(pages[2:], 1).unbind(1) if page_dtype else ()
    pages = Pages(*both.unbind(1), *scales)
    wide = torch.stack((q, q + 1), 1).flatten(1, 2)[:, :4]
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    for strided in (wide, transposed):
        strided.copy_(q)
        out = paged_attention(
            strided, pages, table.t().contiguous().t(), lengths, implementation=implementation
        )
        torch.testing.assert_close(out, expected)


@given(
    lengths=st.lists(st.integers(0, 100), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3), group=st.integers(1, 5), head_dim=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES), page_dtype=st.sampled_from(PAGE_DTYPES),
    implementation=st.sampled_from(EVERY), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15)
def test_any_shape(lengths, kv_heads, group, head_dim, dtype, page_dtype, implementation, seed):
    heads = kv_heads * group
    case = random_case(lengths, heads, kv_heads, head_dim, dtype, page_dtype, None, seed)
    check(case, implementation)


@needs_triton
@pytest.mark.parametrize("page_dtype", [None, torch.int8], ids=str)  # opcheck adds up its inputs
def test_registration(page_dtype):
    q, pages, table, lengths = random_case([40, 3], 2, 2, 32, torch.float32, page_dtype)
    torch.library.opcheck(paged_attention_triton, (q, *pages, table, lengths, 0.2, 2))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("page_dtype", PAGE_DTYPES, ids=str)
def test_compiles_whole(page_dtype, implementation):
    case = random_case([40, 3], 4, 2, 32, torch.float32, page_dtype)

    def attend(q, pages, table, lengths):
        return paged_attention(q, pages, table, lengths, implementation=implementation) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case), attend(*case))


def test_the_default_on_a_cpu_is_torch():
    assert OP.choose("cpu", torch.float32).name == "torch"
    case = random_case([5], 2, 1, 16, torch.float64)
    check_against_truth(
        lambda q: paged_attention(q, *case[1:]),
        lambda q: paged_attention_ref(q, *case[1:], 0.25),
        [case.q], torch.float64, gradients=False,
    )  # fmt: skip


def test_errors():
    q, pages, table, lengths = random_case([40, 3], 4, 2, 32, torch.float32)

    def error(kind, match, **changed):
        arguments = {"q": q, "pages": pages, "block_table": table, "lengths": lengths} | changed
        with pytest.raises(kind, match=r"paged_attention: expected " + match):
            paged_attention(**arguments)

    error(TypeError, "q a tensor, got list", q=[1])
    error(TypeError, "q in one of .*, got torch.int64", q=q.long())
    error(ValueError, r"q \[.* R .*, H >= 1, 1 <= Dh <= 256\], got \[2, 32\]", q=q[:, 0])
    error(ValueError, r"q \[.*, 1 <= Dh <= 256\], got \[2, 4, 300\]", q=torch.zeros(2, 4, 300))
    error(
        ValueError,
        r"q \[0 <= R <= 65535, .*, got \[70000",
        q=torch.zeros(1, 1, 1).expand(70_000, 1, 32),
    )
    error(ValueError, "Hkv dividing the 3 heads of q, got 2", q=q[:, :3])
    error(TypeError, "pages a Pages, got tuple", pages=tuple(pages))
    error(TypeError, "keys in one of .*16, .*int8, .*float8_e4m3fn, got torch.fl", q=q.half())
    error(ValueError, r"keys \[num_pages >= 1, Hkv >= 1, 32, 16\]", q=q[..., :16])
    short = Pages(*(t[:, :, :16] for t in pages[:2]))
    error(ValueError, r"keys \[num_pages .*, Hkv .*, 32, 32\], got \[\d+, 2, 16, 32\]", pages=short)
    strided = Pages(*(t.transpose(2, 3) for t in pages[:2]))
    error(ValueError, r"keys with strides \(…, 32, 1\), got", pages=strided)
    error(ValueError, r"values \[\d+, 2, 32, 32\], got", pages=Pages(pages.keys, pages.values[1:]))
    int8 = new_pages(4, 2, 32, dtype=torch.int8, device=DEVICE)
    error(ValueError, "key_scales a tensor with torch.int8 pages, got None", pages=Pages(*int8[:2]))
    error(ValueError, "value_scales None", pages=Pages(*pages[:2], None, int8.value_scales))
    error(
        TypeError, "key_scales in torch.float32, got torch.float64",
        pages=int8._replace(key_scales=int8.key_scales.double()),
    )  # fmt: skip
    unlike = pages.values.new_zeros(*pages.values.shape, 2)[..., 0]
    error(ValueError, "values with strides .*, got", pages=Pages(pages.keys, unlike))
    scales = int8.key_scales.mT.contiguous().mT
    error(
        ValueError, "key_scales with last stride 1, got strides",
        pages=int8._replace(key_scales=scales),
    )  # fmt: skip
    error(TypeError, "block_table in torch.int32, got torch.int64", block_table=table.long())
    error(ValueError, r"block_table \[2, max_pages >= 1\], got \[1, 2\]", block_table=table[:1])
    error(ValueError, r"block_table \[2, max_pages >= 1\], got \[2, 0\]", block_table=table[:, :0])
    error(TypeError, "lengths a tensor, got list", lengths=[40, 3])
    error(ValueError, r"lengths \[2\], got \[2, 1\]", lengths=lengths[:, None])
    error(ValueError, "keys on meta, got", q=q.to("meta"))
    with pytest.raises(ValueError, match="expected implementation one of triton, torch"):
        paged_attention(q, pages, table, lengths, implementation="native")


@pytest.mark.skipif(DEVICE != "cpu", reason="values on a GPU are not read back")
def test_values_out_of_range_are_named():
    q, pages, table, lengths = random_case([40, 3], 4, 2, 32, torch.float32)
    for value in (-1, len(pages.keys)):
        broken = table.clone()
        broken[0, 1] = value
        message = rf"block_table\[0, 1\] in \[0, {len(pages.keys)}\), got {value}$"
        with pytest.raises(ValueError, match=message):
            paged_attention(q, pages, broken, lengths)
    for value in (-2, 65):
        with pytest.raises(ValueError, match=rf"expected lengths in \[0, 64\], got {value}$"):
            paged_attention(q, pages, table, lengths.clone().fill_(value))
