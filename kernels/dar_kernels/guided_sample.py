"""codes = argmax(filter(guided / T) + Gumbel), guided = uncond + s·(cond − uncond), in one launch.

One row is one program: it reads its 2·V logits once (2·V·itemsize bytes, 64 KiB for V = 16384 in
bf16), keeps them in registers and writes 8 bytes; bound by latency. Nothing is sorted (filters.py);
the noise is a function of (seed, position, code) alone (philox.py).
Source: D-AR (arXiv 2505.23660); Gumbel-max: Maddison et al., A* Sampling (2014).
"""

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import product

import torch
from torch import Tensor

from dar_kernels import native
from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import FLOATS, Dim, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.filters import LARGEST, Setting, column, filter_ref, filter_row
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.philox import code_bits, gumbel, gumbel_row
from dar_kernels.triton_support import TRITON_DTYPES, contiguous_last, launch_options, tl, triton

MAX_VOCAB = 16_384  # of the Triton kernel: a row in registers, 16 codes a thread of 32 warps


def guided_sample_ref(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, positions: Tensor,
    guidance_scale: Setting, temperature: Setting, top_k: Setting, top_p: Setting,
) -> Tensor:  # fmt: skip
    """The definition, in whatever dtype it is given; the noise is fp32."""
    if uncond is not None:
        s = column(guidance_scale, logits)
        logits = torch.where(s > 1, uncond + s * (logits - uncond), logits)
    t = column(temperature, logits)
    # NaN and -inf: never drawn while another code can be; +inf: the largest number
    largest = torch.finfo(logits.dtype).max
    logits = torch.where(logits.isnan(), -math.inf, logits) / torch.where(t > 0, t, 1)
    logits = logits.clamp_max(largest)
    logits = filter_ref(logits, top_k, top_p)
    if isinstance(temperature, Tensor) or temperature > 0:
        noise = gumbel(code_bits(seeds, positions, logits.shape[-1]))
        logits = logits + torch.where(t > 0, noise, 0)
    return logits.argmax(-1)


@triton.jit
def _setting(value, row, PER_ROW: tl.constexpr):
    if PER_ROW:
        value = tl.load(value + row).to(tl.float32)  # a top_k below V is exact in it
    return value


@triton.jit(do_not_specialize=["top_k", "V"])
def _guided_sample_kernel(
    logits_ptr, uncond_ptr, seeds_ptr, positions_ptr, codes_ptr, guidance, temperature, top_k,
    top_p, stride_lr, stride_ur, V, HAS_UNCOND: tl.constexpr, ROW_GUIDANCE: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, ROW_TOP_K: tl.constexpr, ROW_TOP_P: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_V)
    mask = cols < V
    logits = tl.load(logits_ptr + row * stride_lr + cols, mask, float("-inf")).to(tl.float32)
    if HAS_UNCOND:
        s = _setting(guidance, row, ROW_GUIDANCE)
        if s > 1:
            uncond = tl.load(uncond_ptr + row * stride_ur + cols, mask, 0.0).to(tl.float32)
            logits = uncond + s * (logits - uncond)
    logits = tl.where(logits != logits, float("-inf"), logits)
    t = _setting(temperature, row, ROW_TEMPERATURE)
    if t > 0:
        logits = tl.div_rn(logits, t)
    logits = tl.minimum(logits, LARGEST)
    if t > 0:
        k = _setting(top_k, row, ROW_TOP_K)
        p = _setting(top_p, row, ROW_TOP_P)
        logits = filter_row(logits, k, p, V)
        logits += gumbel_row(tl.load(seeds_ptr + row), tl.load(positions_ptr + row), BLOCK_V)
    tl.store(codes_ptr + row, tl.argmax(logits, 0, tie_break_left=True).to(tl.int64))


def _options(block: int) -> dict[str, object]:
    # 16 codes a thread take at most 72 registers: chosen from AOT counts; not timed. No fused
    # multiply-add: guided logits have the bits of PyTorch, so that greedy codes are equal.
    return launch_options(num_warps=max(1, block // 512), enable_fp_fusion=False)


def _triton(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, positions: Tensor, *settings: Setting
) -> Tensor:
    R, V = logits.shape
    codes = torch.empty(R, dtype=torch.int64, device=logits.device)
    logits, base = (contiguous_last(x) for x in (logits, logits if uncond is None else uncond))
    s, t, k, p = (x.contiguous() if isinstance(x, Tensor) else x for x in settings)
    if R:
        block = max(16, triton.next_power_of_2(V))
        _guided_sample_kernel[(R,)](
            logits, base, seeds.contiguous(), positions.contiguous(), codes, s, t, k, p,
            logits.stride(0), base.stride(0), V, HAS_UNCOND=uncond is not None,
            ROW_GUIDANCE=isinstance(s, Tensor), ROW_TEMPERATURE=isinstance(t, Tensor),
            ROW_TOP_K=isinstance(k, Tensor), ROW_TOP_P=isinstance(p, Tensor), BLOCK_V=block,
            **_options(block),
        )  # fmt: skip
    return codes


def _compiled(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, positions: Tensor, *settings: Setting
) -> Tensor:
    """C++ on the CPU, kernels/csrc/guided_sample.cpp."""
    from dar_kernels import _native

    codes = torch.empty(len(logits), dtype=torch.int64)
    dtypes = (torch.float32, torch.float32, torch.int32, torch.float32)
    s, t, k, p = (
        torch.as_tensor(x, dtype=dtype).expand(codes.shape).contiguous()
        for x, dtype in zip(settings, dtypes, strict=True)
    )
    uncond = logits.new_empty(0, 0) if uncond is None else uncond
    _native.guided_sample(
        logits.float().contiguous(), uncond.float().contiguous(), seeds.contiguous(),
        positions.contiguous(), s, t, k, p, codes, torch.get_num_threads(),
    )  # fmt: skip
    return codes


def _native_missing() -> str | None:
    if native.missing() or hasattr(import_module("dar_kernels._native"), "guided_sample"):
        return native.missing()
    return f"the extension was built before it had this op; {native.REMEDY}"


OP = Op(
    name="guided_sample",
    implementations=(
        by_triton(_triton),
        by_native(_compiled, TRITON_DTYPES, _native_missing),
        by_torch(guided_sample_ref),
    ),
)


@torch.library.custom_op("dar::guided_sample", mutates_args=())
def _guided_sample(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, positions: Tensor,
    numbers: Sequence[float], tensors: Sequence[Tensor | None], implementation: str,
) -> Tensor:  # fmt: skip
    s, t, k, p = (n if x is None else x for n, x in zip(numbers, tensors, strict=True))
    k = int(k) if tensors[2] is None else k
    chosen = OP.choose(logits.device.type, logits.dtype, implementation)
    return chosen.run(logits, uncond, seeds, positions, s, t, k, p)


@_guided_sample.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def variants(shape: Shape) -> Iterator[Variant]:
    """Logits of the head in bf16 or fp32, guided or not; settings all numbers, or all one a row."""
    if not isinstance(shape, DecoderShape) or shape.vocab_size > MAX_VOCAB:
        return
    block = triton.next_power_of_2(shape.vocab_size)
    for dtype, guided, rows in product(("bf16", "fp32"), (True, False), (True, False)):
        settings = {"guidance": "fp32", "temperature": "fp32", "top_k": "i32", "top_p": "fp32"}
        yield Variant(
            kernel=_guided_sample_kernel,
            signature=dict.fromkeys(("logits_ptr", "uncond_ptr"), f"*{dtype}")
            | dict.fromkeys(("seeds_ptr", "positions_ptr", "codes_ptr"), "*i64")
            | {name: f"*{type_}" if rows else type_ for name, type_ in settings.items()}
            | dict.fromkeys(("stride_lr", "stride_ur", "V"), "i32"),
            constants={f"ROW_{name.upper()}": rows for name in settings}
            | {"HAS_UNCOND": guided, "BLOCK_V": block},
            aligned=("stride_lr", "stride_ur"),
            options=_options(block),
        )


_LARGEST = {"guidance_scale": 3e38, "temperature": 3e38, "top_k": 2**31 - 1, "top_p": 1}


def _check_setting(name: str, value: object, logits: Tensor) -> None:
    whole, high = name == "top_k", _LARGEST[name]
    if isinstance(value, Tensor):
        dtypes = (torch.int32, torch.int64) if whole else FLOATS
        check_tensor(OP.name, name, value, logits.shape[:1], dtypes, logits.device)
    elif isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        number = "an integer" if whole else "a number"
        raise TypeError(f"guided_sample: expected {name} {number} or a tensor, got {value!r}")
    elif not (low := {"guidance_scale": -high, "top_p": 1e-37}.get(name, 0)) <= value <= high:
        span = f"[{low:g}, {high:g}]"
        raise ValueError(f"guided_sample: expected {name} in {span}, got {value!r}")


def guided_sample(
    logits: Tensor, uncond: Tensor | None, seeds: Tensor, positions: Tensor, *,
    guidance_scale: Setting, temperature: Setting = 1.0, top_k: int | Tensor = 0,
    top_p: Setting = 1.0, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """One code a row by Gumbel-max; a row's code depends on that row's arguments alone.

    Order: guidance (where the scale is > 1), temperature, top-k and top-p as `filter_ref` defines
    them, noise. The lowest code of ties wins. NaN counts as −inf, +inf as the largest fp32; in a
    row of −inf it is 0. Settings as tensors are not read back: their ranges are for the caller.

    Args:
        logits: `[R, V]` fp32, fp16 or bf16; worked on in fp32. Triton: V ≤ 16384.
        uncond: logits of the unconditional rows, as `logits`; None: unguided.
        seeds: `[R]` int64.
        positions: `[R]` int64, in [0, 2^31).
        guidance_scale: a number, or `[R]` of any floating dtype; so are the next ones.
        temperature: ≥ 0; 0 is greedy.
        top_k: ≥ 0, 0 keeps all; `[R]` integers.
        top_p: in (0, 1], 1 keeps all.
        implementation: `triton` (CUDA), `native` (CPU) or `torch`; None: the first that can run.

    Returns:
        int64 `[R]` in [0, V). Not differentiable.

    Raises:
        TypeError: where an argument is of the wrong type or dtype.
        ValueError: where shapes, devices or ranges do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_tensor(OP.name, "logits", logits, ("R", Dim("V")), TRITON_DTYPES)
    (R, V), device = logits.shape, logits.device
    if uncond is not None:
        check_tensor(OP.name, "uncond", uncond, (R, V), (logits.dtype,), device)
    for name, value in (("seeds", seeds), ("positions", positions)):
        check_tensor(OP.name, name, value, (R,), (torch.int64,), device)
    settings = (guidance_scale, temperature, top_k, top_p)
    for name, setting in zip(_LARGEST, settings, strict=True):
        _check_setting(name, setting, logits)
    chosen = OP.pick(logits.device.type, logits.dtype, implementation)
    if chosen == "torch":
        base = None if uncond is None else uncond.detach().float()
        return guided_sample_ref(logits.detach().float(), base, seeds, positions, *settings)
    if chosen == "triton" and V > MAX_VOCAB:
        raise ValueError(f"guided_sample: expected V <= {MAX_VOCAB} for triton, got {V}")
    return _guided_sample(
        logits, uncond, seeds, positions,
        [1.0 if isinstance(x, Tensor) else float(x) for x in settings],
        [x if isinstance(x, Tensor) else None for x in settings], chosen,
    )  # fmt: skip
