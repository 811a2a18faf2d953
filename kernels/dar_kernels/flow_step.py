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
from dar_kernels.dispatch import Implementation, Op
from dar_kernels.triton_support import (
    TRITON_DTYPES,
    contiguous_last,
    launch_options,
    missing,
    tl,
    triton,
)

Solver = Literal["adams2", "euler"]
Preview = Literal["jump", "solver"]
SOLVERS, PREVIEWS = ("adams2", "euler"), ("jump", "solver")
FLAGS = (torch.bool, torch.uint8, torch.int32, torch.int64)
BLOCK = 1024  # eight numbers a thread of four warps: one row of a patch, 16 bytes of it in bf16


class FlowStep(NamedTuple):
    """State, velocity as a picture, and preview after a step, each `[B, 3, R, R]`."""

    x: Tensor
    previous: Tensor
    preview: Tensor


def flow_step_ref(
    x: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    t: Tensor | float,
    h: Tensor | float,
    data_std: float,
    solver: Solver,
    patch_size: int,
    first: Tensor | bool = False,
    preview: Preview = "jump",
) -> FlowStep:
    """The definition, not in place, in the dtype of `x`; in fp64 it is the truth the tests use."""
    P, G = patch_size, x.shape[-1] // patch_size
    v = velocity.to(x.dtype).reshape(-1, G, G, 3, P, P).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
    t, h = (s[:, None, None, None] if isinstance(s, Tensor) else s for s in (t, h))
    slope = v
    if solver == "adams2" and previous is not None and first is not True:
        slope = 1.5 * v - 0.5 * previous
        if isinstance(first, Tensor):
            slope = torch.where(first.bool()[:, None, None, None], v, slope)
    estimate = x + (1 - t) * (v if preview == "jump" else slope)
    return FlowStep(x + h * slope, v, estimate / data_std)


@triton.jit
def _flow_step_kernel(
    x_ptr, velocity_ptr, previous_ptr, preview_ptr, t_ptr, next_t_ptr, first_ptr,
    t, h, data_std, stride_vb, stride_vn,
    ADAMS: tl.constexpr, JUMP: tl.constexpr, R: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < 3 * R * R
    row, col = i // R % R, i % R
    patch = row // P * (R // P) + col // P
    channel = i // (R * R) * (P * P) + row % P * P + col % P
    at = velocity_ptr + b * stride_vb + patch.to(tl.int64) * stride_vn + channel
    v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = b * (3 * R * R) + i
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if t_ptr is not None:
        t = tl.load(t_ptr + b)
        h = tl.load(next_t_ptr + b) - t
    slope = v
    if ADAMS:
        if first_ptr is not None:  # what lies in `previous` then is not looked at
            first = tl.load(first_ptr + b) != 0
            before = tl.load(previous_ptr + at, mask=mask & (first == 0), other=0.0)
            slope = tl.where(first, v, 1.5 * v - 0.5 * before)
        else:
            slope = 1.5 * v - 0.5 * tl.load(previous_ptr + at, mask=mask, other=0.0)
    estimate = x + (1.0 - t) * (v if JUMP else slope)
    tl.store(preview_ptr + at, estimate / data_std, mask=mask)
    tl.store(x_ptr + at, x + h * slope, mask=mask)
    if previous_ptr is not None:
        tl.store(previous_ptr + at, v, mask=mask)


@torch.library.custom_op("dar::flow_step", mutates_args=("x", "previous"))
def _flow_step(
    x: Tensor,
    velocity: Tensor,
    previous: Tensor | None,
    t: Tensor | None,
    next_t: Tensor | None,
    first: Tensor | None,
    t_all: float,
    h_all: float,
    data_std: float,
    adams: bool,
    jump: bool,
    patch_size: int,
) -> Tensor:
    """The preview; times come from the tensors, or from `t_all` and `h_all` where those are None."""
    velocity = contiguous_last(velocity)
    preview = torch.empty_like(x)
    B, _, _, R = x.shape
    _flow_step_kernel[(triton.cdiv(3 * R * R, BLOCK), B)](
        x, velocity, previous, preview, t, next_t,
        first.view(torch.uint8) if first is not None and first.dtype == torch.bool else first,
        t_all, h_all, data_std, velocity.stride(0), velocity.stride(1),
        ADAMS=adams, JUMP=jump, R=R, P=patch_size, BLOCK=BLOCK,
        **launch_options(num_warps=4, num_stages=1),
    )  # fmt: skip
    return preview


@_flow_step.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


OP = Op(
    name="flow_step",
    implementations=(
        Implementation(
            name="triton",
            run=_flow_step,
            devices=("cuda",),
            on_request=("cpu",),
            dtypes=(torch.float32,),
            missing=missing,
        ),
        Implementation(name="torch", run=flow_step_ref),
    ),
)


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if not isinstance(shape, DenoiserShape):
        return
    R = round(shape.patches**0.5) * shape.patch_size
    images = dict.fromkeys(("x_ptr", "previous_ptr", "preview_ptr"), "*fp32")
    scalars = dict.fromkeys(("t", "h", "data_std"), "fp32")
    strides = ("stride_vb", "stride_vn")
    absent = dict.fromkeys(("t_ptr", "next_t_ptr", "first_ptr"))
    for dtype in ("bf16", "fp32"):
        for adams, jump, by_row in ((True, True, True), (True, True, False), (False, True, False)):
            rows = {"t_ptr": "*fp32", "next_t_ptr": "*fp32", "first_ptr": "*u8"} if by_row else {}
            yield Variant(
                kernel=_flow_step_kernel,
                signature=images
                | {"velocity_ptr": f"*{dtype}"}
                | scalars
                | dict.fromkeys(strides, "i32")
                | rows,
                constants={"ADAMS": adams, "JUMP": jump, "R": R, "P": shape.patch_size}
                | {"BLOCK": BLOCK}
                | ({} if by_row else absent),
                aligned=strides,
                options=launch_options(num_warps=4, num_stages=1),
            )


def _check(name: str, tensor: Any, shape: tuple[int, ...], dtypes: Any, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"flow_step: expected {name} a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"flow_step: expected {name} in one of {dtypes}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"flow_step: expected {name} {list(shape)}, got {list(tensor.shape)}")
    if tensor.device != x.device:
        raise ValueError(f"flow_step: expected {name} on {x.device}, got {tensor.device}")
    if name in ("x", "previous") and not tensor.is_contiguous():
        raise ValueError(f"flow_step: expected {name} contiguous, got strides {tensor.stride()}")


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
        x: `[B, 3, R, R]` fp32 (or fp64), contiguous, in units of `data_std`. Becomes the next state.
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
    _check("x", x, tuple(getattr(x, "shape", ())), (torch.float32, torch.float64), x)
    B, R, P = x.shape[0], x.shape[-1], patch_size
    if x.ndim != 4 or x.shape != (B, 3, R, R):
        raise ValueError(f"flow_step: expected x [B, 3, R, R], got {list(x.shape)}")
    if not isinstance(P, int) or P < 1 or R % P:
        raise ValueError(f"flow_step: expected patch_size dividing {R}, got {P!r}")
    if solver not in SOLVERS or preview not in PREVIEWS:
        raise ValueError(
            f"flow_step: expected solver in {SOLVERS} and preview in {PREVIEWS}, "
            f"got {solver!r} and {preview!r}"
        )
    if not data_std > 0:
        raise ValueError(f"flow_step: expected data_std > 0, got {data_std!r}")
    shape = (B, (R // P) ** 2, 3 * P * P)
    _check("velocity", velocity, shape, (*TRITON_DTYPES, x.dtype), x)
    if previous is not None:
        _check("previous", previous, tuple(x.shape), (x.dtype,), x)
    if isinstance(first, Tensor):
        _check("first", first, (B,), FLAGS, x)
    by_row = isinstance(t, Tensor) or isinstance(next_t, Tensor)
    for name, time in (("t", t), ("next_t", next_t)):
        if by_row:
            _check(name, time, (B,), (x.dtype,), x)
        elif not 0 <= time <= 1:
            raise ValueError(f"flow_step: expected {name} in [0, 1], got {time!r}")
    with torch.no_grad():
        if OP.pick(x.device.type, x.dtype, implementation) == "torch":
            h = next_t - t
            step = flow_step_ref(x, velocity, previous, t, h, data_std, solver, P, first, preview)
            x.copy_(step.x)
            if previous is not None:
                previous.copy_(step.previous)
            return step.preview
        times = (t, next_t) if by_row else (None, None)
        numbers = (0.0, 0.0) if by_row else (t, next_t - t)
        adams = solver == "adams2" and previous is not None and first is not True
        flags = first if isinstance(first, Tensor) else None
        return _flow_step(
            x, velocity, previous, *times, flags, *numbers, data_std, adams, preview == "jump", P
        )
