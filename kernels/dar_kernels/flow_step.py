"""One step of the flow: x += h·slope in place, with the preview of the picture it leads to.

    slope = v (Euler, or the first step), 1.5·v − 0.5·v_previous (Adams-Bashforth 2)
    preview = (x + (1 − t)·v) / data_std ("jump"), or with the slope for v ("solver")

Memory bound. Reads x, velocity and previous, writes x, previous and preview: 20 bytes a number and
the velocity's itemsize. The velocity is read as the network writes it, patch by patch, and lands in
`previous` as a picture.
Source: D-AR (arXiv 2505.23660), §3.2; plain weights 1.5 and 0.5 although h varies, as published.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.checks import Dim, check_tensor
from dar_kernels.dispatch import Op
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.triton_support import (
    TRITON_DTYPES,
    contiguous_last,
    launch_options,
    tl,
    triton,
)

Solver = Literal["adams2", "euler"]
Preview = Literal["jump", "solver"]
SOLVERS: tuple[Solver, ...] = ("adams2", "euler")
PREVIEWS: tuple[Preview, ...] = ("jump", "solver")
FLAGS = (torch.bool, torch.uint8, torch.int32, torch.int64)
BLOCK = 1024  # eight numbers a thread of four warps: one row of a patch, 16 bytes in bf16
OPTIONS = launch_options(num_warps=4, num_stages=1)  # from AOT register counts; not timed


class FlowStep(NamedTuple):
    """State, velocity as a picture, and preview after a step, each `[B, 3, R, R]`."""

    x: Tensor
    previous: Tensor
    preview: Tensor


def flow_step_ref(
    x: Tensor, velocity: Tensor, previous: Tensor | None, t: Tensor | float, h: Tensor | float,
    data_std: float, solver: Solver, patch_size: int, first: Tensor | bool = False,
    preview: Preview = "jump",
) -> FlowStep:  # fmt: skip
    """The definition, not in place, h = next_t - t, in the dtype of `x`; the truth in fp64."""
    P, G = patch_size, x.shape[-1] // patch_size
    v = velocity.to(x.dtype).reshape(-1, G, G, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    t, h = (s[:, None, None, None] if isinstance(s, Tensor) else s for s in (t, h))
    slope = v
    if solver == "adams2" and previous is not None and first is not True:
        slope = 1.5 * v - 0.5 * previous
        if isinstance(first, Tensor):
            slope = v.where(first.bool()[:, None, None, None], slope)
    estimate = x + (1 - t) * (v if preview == "jump" else slope)
    return FlowStep(x + h * slope, v, estimate / data_std)


@triton.jit
def _flow_step_kernel(
    x_ptr, velocity_ptr, previous_ptr, preview_ptr, t_ptr, next_t_ptr, first_ptr,
    t, h, data_std, stride_vb, stride_vn,
    ADAMS: tl.constexpr, JUMP: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    # P numbers side by side in the picture are so in the velocity: one row of a patch
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    p = tl.arange(0, BLOCK_P)[None, :]
    mask = (segment < 3 * R * (R // P))[:, None] & (p < P)
    line, column = segment // (R // P), segment % (R // P)  # line: a row of a channel
    patch = line % R // P * (R // P) + column
    channel = line // R * (P * P) + line % P * P  # R is a multiple of P
    at = b * stride_vb + patch.to(tl.int64) * stride_vn + channel
    v = tl.load(velocity_ptr + at[:, None] + p, mask=mask, other=0.0).to(tl.float32)
    at = b * (3 * R * R) + segment[:, None] * P + p
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if t_ptr is not None:
        t = tl.load(t_ptr + b)
        h = tl.load(next_t_ptr + b) - t
    slope = v
    if ADAMS:
        if first_ptr is None:
            slope = 1.5 * v - 0.5 * tl.load(previous_ptr + at, mask=mask, other=0.0)
        elif tl.load(first_ptr + b) == 0:  # else what lies in `previous` is not looked at
            slope = 1.5 * v - 0.5 * tl.load(previous_ptr + at, mask=mask, other=0.0)
    estimate = x + (1.0 - t) * (v if JUMP else slope)
    tl.store(preview_ptr + at, estimate / data_std, mask=mask)
    tl.store(x_ptr + at, x + h * slope, mask=mask)
    if previous_ptr is not None:
        tl.store(previous_ptr + at, v, mask=mask)


def _tile(patch_size: int) -> dict[str, int]:
    block = int(triton.next_power_of_2(patch_size))
    return {"SEGMENTS": max(1, BLOCK // block), "BLOCK_P": block}


@torch.library.custom_op("dar::flow_step", mutates_args=("x", "previous"))
def _flow_step(
    x: Tensor, velocity: Tensor, previous: Tensor | None,
    t: Tensor | None, next_t: Tensor | None, first: Tensor | None, t_all: float, h_all: float,
    data_std: float, adams: bool, jump: bool, patch_size: int,
) -> Tensor:  # fmt: skip
    """The preview; times come from the tensors, or are `t_all` and `t_all + h_all`."""
    velocity = contiguous_last(velocity)
    t, next_t, first = (None if s is None else s.contiguous() for s in (t, next_t, first))
    preview = torch.empty_like(x)
    B, _, _, R = x.shape
    tile = _tile(patch_size)
    _flow_step_kernel[(triton.cdiv(3 * R * R // patch_size, tile["SEGMENTS"]), B)](
        x, velocity, previous, preview, t, next_t,
        first.view(torch.uint8) if first is not None and first.dtype == torch.bool else first,
        t_all, h_all, data_std, velocity.stride(0), velocity.stride(1),
        ADAMS=adams, JUMP=jump, R=R, P=patch_size, **tile,
        **OPTIONS,
    )  # fmt: skip
    return preview


@_flow_step.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


OP = Op(name="flow_step", implementations=(by_triton(_flow_step), by_torch(flow_step_ref)))


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if not isinstance(shape, DenoiserShape):
        return
    R = round(shape.patches**0.5) * shape.patch_size
    rows = ("t_ptr", "next_t_ptr", "first_ptr")
    for dtype in ("bf16", "fp32"):
        signature = dict.fromkeys(("x_ptr", "previous_ptr", "preview_ptr"), "*fp32")
        signature |= dict.fromkeys(("t", "h", "data_std"), "fp32")
        signature |= {"velocity_ptr": f"*{dtype}", "stride_vb": "i32", "stride_vn": "i32"}
        for adams, by_row in ((True, True), (True, False), (False, False)):
            times = dict(zip(rows, ("*fp32", "*fp32", "*u8"), strict=True)) if by_row else {}
            constants: dict[str, int | None] = {} if by_row else dict.fromkeys(rows)
            constants |= {"ADAMS": adams, "JUMP": True, "R": R, "P": shape.patch_size}
            yield Variant(
                kernel=_flow_step_kernel,
                signature=signature | times,
                constants=constants | _tile(shape.patch_size),
                aligned=("stride_vb", "stride_vn"),
                options=OPTIONS,
            )


def flow_step(
    x: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    t: Tensor | float,
    next_t: Tensor | float,
    data_std: float,
    solver: Solver,
    patch_size: int,
    *,
    first: Tensor | bool = False,
    preview: Preview = "jump",
    implementation: str | None = None,
) -> Tensor:
    """Take `x` from time `t` to `next_t` along `velocity`; both are changed in place.

    Args:
        x: `[B, 3, R, R]` fp32 (or fp64), contiguous, times `data_std`. Becomes the next state.
        velocity: `[B, patches, 3 P P]`, channels in the order (c, p1, p2), fp32, fp16, bf16 or the
            dtype of `x`: the network's output at (x, t).
        previous: like `x`: the velocity of the step before, not read where `first`. Becomes this
            step's. None: every row takes a first step and nothing is kept.
        t, next_t: times in [0, 1], a number or fp32 `[B]` each, both of one kind.
        data_std: what the preview is divided by, > 0.
        solver: `adams2` or `euler`.
        patch_size: P, which divides R.
        first: rows that have no step before them, as a bool for all or `[B]` bool or integer.
        preview: `jump`, the paper's, or `solver`, the official one.
        implementation: `triton` (CUDA, fp32 x) or `torch`; None: the first that can run.

    Returns:
        The preview `[B, 3, R, R]` in the dtype of `x`, in image units, not clamped. No gradients.

    Raises:
        TypeError: where an argument is no tensor or has the wrong dtype.
        ValueError: where a shape, device, stride or value does not fit.
        UnavailableError: where the named implementation cannot run here.
    """
    op, exact = "flow_step", (torch.float32, torch.float64)
    check_tensor(op, "x", x, ("B", 3, Dim("R"), Dim("R")), exact)
    B, _, R, width = x.shape
    if width != R or not isinstance(patch_size, int) or patch_size < 1 or R % patch_size:
        got = f"{list(x.shape)} and {patch_size!r}"
        raise ValueError(f"{op}: expected x [B, 3, R, R] and patch_size dividing R, got {got}")
    G, dtype, device = R // patch_size, x.dtype, x.device
    sizes = (B, G * G, 3 * patch_size**2)
    check_tensor(op, "velocity", velocity, sizes, (*TRITON_DTYPES, dtype), device)
    if previous is not None:
        check_tensor(op, "previous", previous, x.shape, (dtype,), device)
    for name, tensor in (("x", x), ("previous", previous)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{op}: expected {name} contiguous, got strides {tensor.stride()}")
    if isinstance(first, Tensor):
        check_tensor(op, "first", first, (B,), FLAGS, device)
    by_row = isinstance(t, Tensor) or isinstance(next_t, Tensor)
    for name, time in (("t", t), ("next_t", next_t)):
        if by_row:
            check_tensor(op, name, time, (B,), (dtype,), device)
        elif not 0 <= time <= 1:
            raise ValueError(f"{op}: expected {name} in [0, 1], got {time!r}")
    if solver not in SOLVERS or preview not in PREVIEWS or not data_std > 0:
        expected = f"solver in {SOLVERS}, preview in {PREVIEWS} and data_std > 0"
        raise ValueError(f"{op}: expected {expected}, got {solver!r}, {preview!r}, {data_std!r}")
    with torch.no_grad():
        if OP.pick(x.device.type, x.dtype, implementation) == "torch":
            options = data_std, solver, patch_size, first, preview
            step = flow_step_ref(x, velocity, previous, t, next_t - t, *options)
            x.copy_(step.x)
            if previous is not None:
                previous.copy_(step.previous)
            return step.preview
        times = (t, next_t) if by_row else (None, None)
        numbers = (0.0, 0.0) if by_row else (t, next_t - t)
        adams = solver == "adams2" and previous is not None and first is not True
        jump = preview == "jump"
        flags = first if isinstance(first, Tensor) else None
        return _flow_step(
            x, velocity, previous, *times, flags, *numbers, data_std, adams, jump, patch_size
        )
