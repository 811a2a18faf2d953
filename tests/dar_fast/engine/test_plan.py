"""The memory plan against real modules, real tensors and measured peaks."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dar_fast.config import PRIORS, TOKENIZERS, PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.diffusion import Diffusion
from dar_fast.engine.memory import available_memory
from dar_fast.engine.parameters import prior_parameters, tokenizer_parameters
from dar_fast.engine.plan import (
    MemoryPlan,
    check_fits,
    dit_activations,
    largest_batch,
    page_bytes,
    plan_memory,
)
from dar_fast.engine.rows import StepRow
from dar_fast.engine.slots import SlotState
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.layers import Linear, pack
from dar_fast.quantization import engine_weights
from dar_kernels import native
from dar_kernels.pages import Pages, new_pages

GB = 10**9
UNREAD = ("encoder.", "quantizer.proj_in.", "pixel_dit.repa_out.")
GROUPED = PriorConfig(
    dim=64, depth=3, heads=4, kv_heads=2, vocab_size=100, num_tokens=40, num_classes=7
)
SMALL = TokenizerConfig(
    image_size=64, patch_size=16, encoder_dim=64, encoder_depth=1, decoder_dim=64, decoder_depth=2,
    codebook_size=64, num_tokens=64, query_table=64,
    dit=PixelDiTConfig(dim=128, depth=2, patch_size=4, repa_layer=1),
)  # fmt: skip


def count(module: torch.nn.Module, **unread: tuple[str, ...]) -> int:
    names = unread.get("unread", ())
    return sum(p.numel() for n, p in module.named_parameters() if not n.startswith(names))


def demo(**options: Any) -> MemoryPlan:
    fixed: dict[str, Any] = {"max_requests": 4, "dtype": torch.float32, "device_type": "cpu"}
    options = fixed | options
    return plan_memory(PRIORS["demo"], TOKENIZERS["demo"], **options)


def h100(prior: str, max_requests: int = 1, **options: Any) -> MemoryPlan:
    options = {"dtype": torch.bfloat16} | options
    return plan_memory(PRIORS[prior], TOKENIZERS["v1"], max_requests=max_requests, **options)


@pytest.mark.parametrize("config", [*PRIORS.values(), GROUPED], ids=[*PRIORS, "grouped"])
def test_a_prior_has_the_planned_parameters(config: PriorConfig) -> None:
    with torch.device("meta"):
        prior = Prior(config)
    assert prior_parameters(config) == count(prior)


@pytest.mark.parametrize("config", [*TOKENIZERS.values(), SMALL], ids=[*TOKENIZERS, "small"])
def test_a_tokenizer_has_the_planned_parameters(config: TokenizerConfig) -> None:
    with torch.device("meta"):
        tokenizer = Tokenizer(config)
    read, other = tokenizer_parameters(config)
    assert read == count(tokenizer, unread=UNREAD)
    assert read + other == count(tokenizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loaded_bytes_are_those_of_the_modules(dtype: torch.dtype) -> None:
    parts = Prior(PRIORS["demo"]).to(dtype), Tokenizer(TOKENIZERS["demo"]).to(dtype)
    plan = demo(dtype=dtype)
    pack(parts[1].pixel_dit)
    packed = [m.packed.packed for m in parts[1].modules() if isinstance(m, Linear) and m.packed]
    assert plan.packed == sum(w.numel() * w.element_size() for w in packed)
    assert plan.loaded - plan.packed == sum(
        p.numel() * p.element_size() for part in parts for p in part.parameters()
    )


@pytest.mark.parametrize("config", [PRIORS["demo"], GROUPED], ids=["demo", "grouped"])
def test_one_byte_copies_are_those_that_decoding_makes(config: PriorConfig) -> None:
    prior = Prior(config).eval()
    weights = engine_weights(prior, "int8")
    held = [part for layer in weights.layers for w in layer.products() for part in w]
    copies = sum(part.numel() * part.element_size() for part in (*held, *weights.head))
    tokenizer = TOKENIZERS["demo"]
    options: dict[str, Any] = {"max_requests": 1, "dtype": torch.float32, "device_type": "cpu"}
    plan = plan_memory(config, tokenizer, weights_dtype="int8", **options)
    assert plan.prior_copies == copies
    assert plan_memory(config, tokenizer, **options).prior_copies == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("config", [PRIORS["demo"], GROUPED], ids=["demo", "grouped"])
def test_a_page_is_as_large_as_real_ones(config: PriorConfig, dtype: torch.dtype) -> None:
    pages: Pages = new_pages(3, config.key_value_heads, config.head_dim, dtype=dtype, device="cpu")
    size = sum(part.numel() * part.element_size() for part in pages if part is not None)
    assert 3 * page_bytes(config, dtype) == config.depth * size


def test_the_sizes_that_the_mathematics_states() -> None:
    """REFERENCE section 8: 96 KiB of keys and values a token and row of L, 180 of XL."""
    for name, kib in (("L", 96), ("XL", 180)):
        assert page_bytes(PRIORS[name], torch.bfloat16) == 32 * kib * 1024
        assert h100(name, 3).pages == 3 * 2 * 256 * kib * 1024
    assert h100("L").prior == pytest.approx(2 * 343e6, rel=0.01)
    assert h100("L").tokenizer + h100("L").encoder == pytest.approx(2 * 307e6, rel=0.01)


def test_slots_are_those_of_the_state() -> None:
    tokenizer = Tokenizer(TOKENIZERS["demo"])
    state = SlotState(tokenizer, 4)
    tensors = [v for v in vars(state).values() if isinstance(v, torch.Tensor)] + [*state.cache]
    assert demo().slots == sum(t.numel() * t.element_size() for t in tensors)


def peak_bytes(work: Any) -> int:
    """Most bytes that torch had allocated at once while `work` ran."""
    work()  # tables that are made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, change in changes:
        live += change
        most = max(most, live)
    return most


@pytest.mark.skipif(native.missing() is not None, reason="the plan is of the C++ ops")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("config", [SMALL, TOKENIZERS["demo"]], ids=["small", "demo"])
def test_planned_activations_are_the_measured_peak(
    config: TokenizerConfig, batch: int, dtype: torch.dtype
) -> None:
    tokenizer = Tokenizer(config).to(dtype).eval()
    pack(tokenizer.pixel_dit)
    slots = SlotState(tokenizer, batch)
    conditions, diffusion = Conditions(tokenizer, slots), Diffusion(tokenizer, slots)
    ids = list(range(batch))
    for slot in ids:
        diffusion.start(slot, slot)
    conditions.extend(0, ids)
    rows = [StepRow(slot=i, step=0, num_steps=8, solver="adams2") for i in ids]
    diffusion.step(rows)
    t, rows_of = torch.full((batch,), 0.1), torch.tensor(ids)
    times = torch.stack([diffusion._time(0, 8)] * batch, 1)
    first = torch.zeros(batch, dtype=torch.bool)
    measured = peak_bytes(lambda: diffusion.evaluate(rows_of, times, t, t + 0.1, first))
    planned = dit_activations(config, batch, dtype, "cpu")
    assert 0.99 * planned <= measured <= 1.01 * planned + (dtype != torch.float32) * 0.07 * planned


def test_a_plan_grows_with_what_it_is_given() -> None:
    plans = [h100("L", n) for n in (1, 2, 7, 64, 65, 500)]
    for small, large in pairwise(plans):
        assert small.total < large.total
        assert all(part <= large.parts()[name] for name, part in small.parts().items())
    plan = plans[2]
    assert plan.total == sum(plan.parts().values())
    assert h100("L", 7, page_dtype=torch.int8).pages < 0.6 * plan.pages
    assert h100("L", 7, weights_dtype="fp8").prior_copies == pytest.approx(plan.prior / 2, rel=0.1)
    assert h100("L", 7, num_pages=10).pages == 10 * page_bytes(PRIORS["L"], torch.bfloat16)
    assert h100("L", 7, capture=False).graphs == 0 < plan.graphs
    assert h100("L", 64, diffusion_batch=1).activations < h100("L", 64).activations


@pytest.mark.parametrize("prior", ["L", "XL", "7B"])
def test_the_largest_batch_fits_and_one_more_does_not(prior: str) -> None:
    budget = 80 * GB
    most = largest_batch(h100(prior), budget)
    assert h100(prior, most).total <= budget < h100(prior, most + 1).total
    budgets = [largest_batch(h100(prior), b * GB) for b in (0, 1, 20, 40, 80, 160)]
    assert budgets == sorted(budgets) and budgets[0] == budgets[1] == 0
    assert largest_batch(h100(prior, page_dtype=torch.float8_e4m3fn), budget) > most
    assert largest_batch(h100(prior, 99), budget) == most  # of the plan, the number does not count


def test_larger_priors_leave_room_for_fewer() -> None:
    most = [largest_batch(h100(prior), 80 * GB) for prior in ("L", "XL", "7B")]
    assert most == sorted(most, reverse=True)
    assert 500 < most[0] < 1500 and 100 < most[2] < 300


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    plan = demo(max_requests=64)
    check_fits(plan, plan.total)
    check_fits(plan, plan.total - plan.loaded, loaded=True)
    room = demo(max_requests=10).total
    message = r"max_requests: expected at most 10, which fit in 0\.1 GiB, got 64, which take 0\.2"
    with pytest.raises(ValueError, match=message):
        check_fits(plan, room)
    with pytest.raises(ValueError, match="expected at most 0, which fit"):
        check_fits(plan, 0, loaded=True)
    with pytest.raises(ValueError, match="max_requests: expected an integer >= 1, got 0"):
        demo(max_requests=0)


def system(root: Path, groups: str, **files: str) -> Path:
    contents = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"} | files
    if groups:
        contents["proc/self/cgroup"] = groups
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_cpu_has_what_the_system_and_the_group_leave(tmp_path: Path) -> None:
    assert available_memory("cpu", system(tmp_path / "plain", "")) == 8000 * 1024
    v2 = {
        "sys/fs/cgroup/a/memory.max": "5000000\n",
        "sys/fs/cgroup/a/memory.current": "2000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 300000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "1\n",
        "sys/fs/cgroup/a/b/memory.stat": "inactive_file 0\n",
    }
    root = system(tmp_path / "v2", "0::/a/b\n", **v2)
    assert available_memory("cpu", root) == 3_300_000  # of the group around
    v1 = {
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "4000000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "4500000\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\n",
    }
    groups = "4:cpu:/x\n3:memory:/seen/from/outside\n0::/\n"
    assert available_memory("cpu", system(tmp_path / "v1", groups, **v1)) == 0
    v1["sys/fs/cgroup/memory/memory.limit_in_bytes"] = "9223372036854771712\n"  # none
    assert available_memory("cpu", system(tmp_path / "v1", groups, **v1)) == 8000 * 1024


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory("cpu") < 2**50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_has_what_the_driver_calls_free() -> None:
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    before = available_memory("cuda")
    del held  # torch keeps it, and may give it out again
    assert available_memory("cuda") - before >= 2**28
