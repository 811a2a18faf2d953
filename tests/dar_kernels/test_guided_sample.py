"""guided_sample: the noise bit for bit, the support exactly, the codes of every implementation."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from truth import DEVICE, TRITON

from dar_kernels import UnavailableError
from dar_kernels.filters import filter_ref, filter_row
from dar_kernels.guided_sample import (
    MAX_VOCAB,
    OP,
    _guided_sample,
    guided_sample,
    guided_sample_ref,
)
from dar_kernels.philox import code_bits, code_bits_row, gumbel, gumbel_row
from dar_kernels.triton_support import tl, triton

GOLDEN = Path(__file__).parents[1] / "golden/prior_tiny.safetensors"
WAYS = [
    name
    for name in ("torch", "native", "triton")
    if next(i for i in OP.implementations if i.name == name).why_not(DEVICE, torch.float32, True)
    is None
]
SETTINGS = {
    "plain": (1.0, 1.0, 0, 1.0),
    "guided": (3.0, 0.7, 0, 1.0),
    "top-k": (3.0, 1.0, 7, 1.0),
    "top-p": (1.5, 1.0, 0, 0.8),
    "both": (4.0, 1.3, 12, 0.9),
}
NAMES = ("guidance_scale", "temperature", "top_k", "top_p")
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, bits_ptr, noise_ptr, V: tl.constexpr):
    row = tl.program_id(0)
    seed, position = tl.load(seeds_ptr + row), tl.load(positions_ptr + row)
    at = row * V + tl.arange(0, V)
    tl.store(bits_ptr + at, code_bits_row(seed, position, V).to(tl.int64))
    tl.store(noise_ptr + at, gumbel_row(seed, position, V))


@triton.jit
def _filter_kernel(logits_ptr, out_ptr, temperature, top_k, top_p, V, BLOCK_V: tl.constexpr):
    cols = tl.arange(0, BLOCK_V)
    at = tl.program_id(0) * V + cols
    logits = tl.load(logits_ptr + at, cols < V, float("-inf"))
    logits = filter_row(tl.div_rn(logits, temperature), top_k, top_p, V)
    tl.store(out_ptr + at, logits, cols < V)


def triton_filter(logits, temperature, top_k, top_p):
    out, (R, V) = torch.empty_like(logits), logits.shape
    block = triton.next_power_of_2(V)
    _filter_kernel[(R,)](logits, out, temperature, top_k, top_p, V, BLOCK_V=block)
    return out


def draw_inputs(R, V, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits, uncond = (2 * torch.randn(R, V, generator=generator) for _ in range(2))
    seeds = torch.randint(0, 2**63 - 1, (R,), generator=generator)
    positions = torch.randint(0, 256, (R,), generator=generator)
    return [t.to(DEVICE) for t in (logits.to(dtype), uncond.to(dtype), seeds, positions)]


def undecided(logits, uncond, seeds, positions, s, t, k, p):
    """Rows where fp32 may choose otherwise: two scores, or a mass and top_p, closer than 1e-5."""
    guided = uncond + s * (logits - uncond) if s > 1 else logits
    guided = guided.double() / t
    kept = filter_ref(guided, k, p)
    score = (kept + gumbel(code_bits(seeds, positions, logits.shape[-1]))).topk(2).values
    mass = filter_ref(guided, k, 1.0).softmax(-1).sort(descending=True).values.cumsum(-1)
    return ((score[:, 0] - score[:, 1]) < 1e-5) | ((mass - p).abs() < 1e-5).any(-1) & (p < 1)


@needs_triton
def test_triton_noise_has_the_same_bits():
    V = 4096
    seeds = torch.tensor([0, 1, 2**63 - 1, -1, 0x299F31D0A4093822], device=DEVICE)
    positions = torch.tensor([0, 255, 2**31 - 1, 7, 3], device=DEVICE)
    bits = torch.empty(5, V, dtype=torch.int64, device=DEVICE)
    noise = torch.empty(5, V, device=DEVICE)
    _noise_kernel[(5,)](seeds, positions, bits, noise, V=V)
    expected = code_bits(seeds, positions, V)
    assert torch.equal(bits, expected)
    torch.testing.assert_close(noise, gumbel(expected), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(
    ("key", "temperature", "top_k", "top_p"),
    [("top_k", 1.0, 20, 1.0), ("top_p", 1.0, 0, 0.8), ("both", 0.7, 50, 0.9)],
)
def test_support_is_the_golden_one(way, key, temperature, top_k, top_p):
    with safe_open(GOLDEN, "pt") as file:
        logits = file.get_tensor("filter.logits").to(DEVICE)
        expected = file.get_tensor(f"filter.probs.{key}").to(DEVICE)
    if way == "triton":
        filtered = triton_filter(logits, temperature, top_k, top_p)
    else:
        filtered = filter_ref(logits / temperature, top_k, top_p)
    assert torch.equal(filtered > -math.inf, expected > 0)
    torch.testing.assert_close(filtered.softmax(-1), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("way", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (3, 1.0), (0, 0.5), (4, 0.5), (0, 1e-6)])
def test_ties_stay_or_go_together(way, top_k, top_p):
    logits = torch.tensor([[0.0, 2, -0.0, 2, -1, 1, 1, 2, -math.inf, 1]], device=DEVICE)
    greater = logits[..., None, :] > logits[..., :, None]  # [R, V, V]
    kept = greater.sum(-1) < top_k if top_k else torch.ones_like(logits, dtype=torch.bool)
    mass = logits.masked_fill(~kept, -math.inf).softmax(-1)
    kept &= (greater * mass[:, None]).sum(-1) <= top_p
    filtered = triton_filter(logits, 1.0, top_k, top_p) if way == "triton" else None
    filtered = filter_ref(logits, top_k, top_p) if filtered is None else filtered
    assert torch.equal(filtered, logits.masked_fill(~kept, -math.inf))


@given(st.floats(0.05, 20), st.integers(0, 40), st.floats(0.01, 1))
def test_filters_keep_the_likeliest_and_no_more_than_asked(temperature, top_k, top_p):
    logits = torch.linspace(-3, 3, 33)[None].roll(7, -1) / temperature
    kept = filter_ref(logits, top_k, top_p)[0] > -math.inf
    assert kept[logits.argmax()]
    p = logits[0].softmax(-1)
    if top_k:
        assert int(kept.sum()) <= min(top_k, 33)
    if top_k == 0 and top_p < 1:
        least = p[kept].min()
        assert float(p[p > least].sum()) <= top_p + 1e-5
        assert float(p[kept].sum()) >= top_p - 1e-5


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_codes_are_those_of_fp64(way, name):
    R = 6 if way == "triton" and DEVICE == "cpu" else 10_000  # programs are interpreted singly
    inputs, settings = draw_inputs(R, 50), SETTINGS[name]
    wide = [t.double() for t in inputs[:2]]
    expected = guided_sample_ref(*wide, *inputs[2:], *settings)
    named = dict(zip(NAMES, settings, strict=True))
    codes = guided_sample(*inputs, **named, implementation=way)
    differ = codes != expected
    assert (differ <= undecided(*inputs, *settings)).all()
    assert differ.float().mean() < 1e-2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("V", [16_384, 4096, 1001, 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_vocabularies_and_layouts(way, V, dtype):
    """Rows of a transposed matrix, both halves of one batch; filters only where V is small."""
    logits, uncond, seeds, positions = draw_inputs(2, V, dtype=dtype)
    both = torch.cat((logits, uncond)).T.contiguous().T
    settings = {"guidance_scale": 2.5, "temperature": 0.9}
    settings |= {"top_k": 40, "top_p": 0.95} if V == 1001 else {}
    codes = guided_sample(both[:2], both[2:], seeds, positions, **settings, implementation=way)
    wide = [t.double() for t in (logits, uncond)]
    expected = guided_sample_ref(
        *wide, seeds, positions, 2.5, 0.9, settings.get("top_k", 0), settings.get("top_p", 1.0)
    )
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_alone(way):
    """Each row with its own settings: in a batch, alone, reversed, with numbers for tensors."""
    inputs = draw_inputs(6, 37)
    rows = [
        torch.tensor([1.0, 3, 8, 0.5, 2, 4], device=DEVICE),
        torch.tensor([1.0, 0, 0.5, 2, 1, 1], device=DEVICE),
        torch.tensor([0, 5, 9, 40, 1, 0], device=DEVICE, dtype=torch.int32),
        torch.tensor([1.0, 1, 0.7, 0.9, 1, 0.5], device=DEVICE),
    ]
    batch = guided_sample(*inputs, **dict(zip(NAMES, rows, strict=True)), implementation=way)
    back = guided_sample(
        *(t.flip(0) for t in inputs),
        **{n: t.flip(0) for n, t in zip(NAMES, rows, strict=True)},
        implementation=way,
    )
    assert torch.equal(batch, back.flip(0))
    wide = [t.double() for t in inputs[:2]]
    assert torch.equal(batch, guided_sample_ref(*wide, *inputs[2:], *rows))
    for i in range(6):
        alone = {n: t[i].item() for n, t in zip(NAMES, rows, strict=True)}
        one = guided_sample(*(t[i : i + 1] for t in inputs), **alone, implementation=way)
        assert torch.equal(one, batch[i : i + 1])


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("way", WAYS)
def test_extreme_logits(way):
    inf, nan = math.inf, math.nan
    logits = torch.tensor(
        [
            [-inf, -inf, -inf, -inf, -inf],  # nothing to choose from: 0
            [nan, -inf, nan, -inf, 1.0],  # the only number
            [1.0, inf, 5.0, nan, inf],  # the lower of the two largest
            [1e30, -1e30, 1e30, 2.0, 0.0],  # a tie that noise cannot reach
            [-3e38, 3e38, 3e38, -3e38, 0.0],
            [-inf, 0.0, -0.0, -inf, -1e-45],
        ],
        device=DEVICE,
    )
    R = len(logits)
    seeds = torch.arange(R, device=DEVICE)
    first = torch.tensor([0, 4, 1, 0, 1, 1], device=DEVICE)
    greedy = guided_sample(
        logits, None, seeds, seeds, guidance_scale=1, temperature=0, implementation=way
    )
    assert torch.equal(greedy, first)
    for top_k, top_p in ((0, 1.0), (1, 1.0), (2, 1e-6)):
        codes = guided_sample(
            logits, None, seeds, seeds, guidance_scale=1, temperature=0.5, top_k=top_k,
            top_p=top_p, implementation=way,
        )  # fmt: skip
        assert torch.equal(codes[:5], first[:5])
        assert codes[5] in (1, 2, 4)  # within 1e-45 of each other
    # uncond counts only above a scale of 1; inf - inf is NaN, so that code is never drawn
    uncond = torch.full_like(logits, nan)
    same = guided_sample(
        logits, uncond, seeds, seeds, guidance_scale=1.0, temperature=0, implementation=way
    )
    assert torch.equal(same, first)
    row, base = logits[2:3], logits.new_tensor([[0.0, inf, 0, 0, 0]])
    code = guided_sample(
        row, base, seeds[:1], seeds[:1], guidance_scale=2.0, temperature=0, implementation=way
    )
    assert code.item() == 4


@pytest.mark.parametrize("way", [w for w in WAYS if w != "triton" or DEVICE == "cuda"])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_filtered_distribution(way, name):
    """Chi-square; interpreted Triton is too slow for it, and draws the codes of fp64 above."""
    s, t, k, p = SETTINGS[name]
    draws, V = 40_000, 24
    logits, uncond, _, _ = draw_inputs(1, V, seed=1)
    guided = uncond + s * (logits - uncond) if s > 1 else logits
    probability = filter_ref((guided / t).double(), k, p).softmax(-1)[0]
    codes = guided_sample(
        logits.expand(draws, V), uncond.expand(draws, V), torch.arange(draws, device=DEVICE),
        torch.full((draws,), 3, device=DEVICE), guidance_scale=s, temperature=t, top_k=k, top_p=p,
        implementation=way,
    )  # fmt: skip
    observed, expected = torch.bincount(codes, minlength=V).double(), draws * probability
    assert (observed[probability == 0] == 0).all()
    often = expected > 5
    chi = float(((observed - expected)[often] ** 2 / expected[often]).sum())
    freedom = int(often.sum()) - 1
    assert chi < freedom + 5 * math.sqrt(2 * max(freedom, 1))  # five standard deviations


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way):
    codes = guided_sample(*draw_inputs(0, 9), guidance_scale=2.0, implementation=way)
    assert codes.shape == (0,)
    assert codes.dtype == torch.int64


@pytest.mark.parametrize("way", [w for w in WAYS if w != "torch"])
def test_registration(way):
    inputs = draw_inputs(2, 16)
    k = torch.tensor([3, 4], device=DEVICE)
    torch.library.opcheck(
        _guided_sample, (*inputs, [2.0, 1.0, 0.0, 0.9], [None, None, k, None], way)
    )


@pytest.mark.parametrize("way", [*WAYS, None])
def test_compiles(way):
    def sample(logits, uncond, seeds, positions, top_p):
        return guided_sample(
            logits, uncond, seeds, positions, guidance_scale=2.0, top_k=5, top_p=top_p,
            implementation=way,
        )  # fmt: skip

    inputs = (*draw_inputs(2, 16), torch.tensor([0.5, 0.9], device=DEVICE))
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), sample(*inputs))


WRONG = {
    "list": ({"logits": [1.0]}, TypeError, "expected logits a tensor, got list"),
    "fp64": (
        {"logits": torch.ones(2, 4).double()},
        TypeError,
        "logits in one .*, got torch.float64",
    ),
    "1-d": ({"logits": torch.ones(4)}, ValueError, r"expected logits \[R, V >= 1\], got \[4\]"),
    "no-codes": ({"logits": torch.ones(2, 0)}, ValueError, r"\[R, V >= 1\], got \[2, 0\]"),
    "uncond": ({"uncond": torch.ones(2, 5)}, ValueError, r"uncond \[2, 4\], got \[2, 5\]"),
    "uncond-dtype": (
        {"uncond": torch.ones(2, 4).half()},
        TypeError,
        "uncond in .*float32, got",
    ),
    "seeds": ({"seeds": torch.ones(2)}, TypeError, "expected seeds in torch.int64, got"),
    "rows": ({"positions": torch.ones(3).long()}, ValueError, r"positions \[2\], got \[3\]"),
    "scale": ({"guidance_scale": math.nan}, ValueError, r"guidance_scale in \[-3e\+38, 3e\+38\]"),
    "negative": ({"temperature": -1}, ValueError, r"temperature in \[0, 3e\+38\], got -1"),
    "text": ({"temperature": "1"}, TypeError, "temperature a number or a tensor, got '1'"),
    "float-k": ({"top_k": 3.0}, TypeError, "top_k an integer or a tensor, got 3.0"),
    "k-dtype": (
        {"top_k": torch.ones(2)},
        TypeError,
        "top_k in one .*int32, .*int64, got",
    ),
    "top-p": ({"top_p": 1.5}, ValueError, r"top_p in \[1e-37, 1\], got 1.5"),
    "p-rows": ({"top_p": torch.ones(3)}, ValueError, r"expected top_p \[2\], got \[3\]"),
    "device": ({"seeds": torch.ones(2, device="meta").long()}, ValueError, "seeds on .*, got meta"),
    "name": ({"implementation": "cudnn"}, ValueError, "one of triton, native, torch"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    change, error, message = WRONG[case]
    arguments = {"logits": torch.ones(2, 4), "uncond": None, "guidance_scale": 1.0}
    arguments |= dict.fromkeys(("seeds", "positions"), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(error, match=f"guided_sample: .*{message}"):
        guided_sample(**(arguments | change))


@needs_triton
def test_widest_vocabulary_of_triton():
    inputs = draw_inputs(1, MAX_VOCAB + 1)
    with pytest.raises(ValueError, match="expected V <= 16384 for triton, got 16385"):
        guided_sample(*inputs, guidance_scale=1.0, implementation="triton")


def test_native_is_for_cpus():
    with pytest.raises(UnavailableError, match="native: runs on cpu only"):
        OP.choose("cuda", torch.float32, "native")
