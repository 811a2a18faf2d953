"""loss = logsumexp(x Wᵀ) − (x Wᵀ)[target], row by row, without the [M, V] logits.

Compute bound: 2·M·V·D FLOPs forward, 6·M·V·D backward (that product again, dx and dweight): 8 where
storing the logits takes 6, and no [M, V] in memory (M = 8192, V = 16384: 537 MB in fp32, and as
much for their gradient). Of a training step of prior L the repeated product is 1.6%.
CUDA: one program a tile of logits, which stays on chip; it writes its logsumexp, 4·M·V/BLOCK_V
bytes in all, and a small reduction combines them. CPU: chunks of rows, their softmax in C++; where
gradients of a mean or a sum are asked for, a chunk gives its own while its logits are there, so
6·M·V·D in all.
Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models (2024).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dar_kernels import native
from dar_kernels.aot import DecoderShape, Shape, Variant
from dar_kernels.checks import Dim, check_below, check_tensor, dtypes_beside, lowered
from dar_kernels.dispatch import Implementation, Op, needs_grad
from dar_kernels.implementations import by_torch, by_triton
from dar_kernels.linear_cross_entropy_backward import (
    add_gradients,
    chunks,
    dlogits_kernel,
    dlogits_of,
    inside,
    linear_cross_entropy_backward,
    logits_tile,
    rows_native,
    tiles_for,
    tiles_of,
    wide,
)
from dar_kernels.triton_support import contiguous_last, tl, triton

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_ref(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Losses `[M]`: the definition, in whatever dtype it is given; in fp64 it is the truth."""
    return torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")


@triton.jit(do_not_specialize=["M"])
def _lse_kernel(
    x_ptr, weight_ptr, targets_ptr, lse_ptr, picked_ptr, stride_xm, stride_wv, M, V, D,
    EVEN_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_v, rows, cols, logits = logits_tile(
        x_ptr, weight_ptr, stride_xm, stride_wv, M, V, D, EVEN_D, GROUP, BLOCK_M, BLOCK_V, BLOCK_D
    )
    top = tl.max(logits, 1)
    lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    tl.store(lse_ptr + tile_v.to(tl.int64) * M + rows, lse, rows < M)
    target = tl.load(targets_ptr + rows, rows < M, -1)
    at_target = cols[None, :] == target[:, None]
    here = (target // BLOCK_V == tile_v) & (target >= 0) & (target < V)
    picked = tl.sum(tl.where(at_target, logits, 0.0), 1)
    tl.store(picked_ptr + rows, picked, (rows < M) & here)


def _lse_triton(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    (M, D), V, launch = x.shape, len(weight), tiles_of(x)
    parts = triton.cdiv(V, launch.block_v)
    lse = torch.empty(parts, M, dtype=torch.float32, device=x.device)
    picked = torch.full((M,), math.nan, dtype=torch.float32, device=x.device)
    _lse_kernel[(triton.cdiv(M, launch.block_m) * parts,)](
        x, weight, targets, lse, picked, x.stride(0), weight.stride(0), M, V, D,
        **launch.constants(D), **launch.options,
    )  # fmt: skip
    return lse.logsumexp(0), picked


def _lse_torch(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    lse, picked = (torch.empty(len(x), dtype=wide(x), device=x.device) for _ in range(2))
    for rows in chunks(x, weight):
        logits = (x[rows] @ weight.T).to(lse.dtype)
        index, valid = inside(targets[rows], len(weight))
        lse[rows] = logits.logsumexp(-1)
        picked[rows] = torch.where(valid, logits.gather(1, index), math.nan).squeeze(1)
    return lse, picked


def _lse_native(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    lse, losses = (torch.empty(len(x), dtype=torch.float32) for _ in range(2))
    for rows in chunks(x, weight):
        rows_native(x[rows] @ weight.T, targets[rows], None, losses[rows], lse[rows])
    return lse, lse - losses


OP = Op(
    name="linear_cross_entropy",
    implementations=(
        by_triton(_lse_triton),
        Implementation(
            name="native", run=_lse_native, devices=("cpu",),
            dtypes=(torch.float32, torch.bfloat16), missing=native.missing,
        ),
        by_torch(_lse_torch),
    ),
)  # fmt: skip


@torch.library.custom_op("dar::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps `[M]`; opaque to torch.compile, which would unroll the chunks."""
    chosen = OP.choose(x.device.type, x.dtype, implementation)
    if len(x) == 0:
        return x.new_empty(0, dtype=wide(x)), x.new_empty(0, dtype=wide(x))
    with torch.autocast(x.device.type, enabled=False):
        lse, picked = chosen.run(contiguous_last(x), contiguous_last(weight), targets.contiguous())
    return lse - picked, lse


@_linear_cross_entropy.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=wide(x)), x.new_empty(x.shape[0], dtype=wide(x))


def _setup_context(ctx, inputs, output) -> None:
    x, weight, targets, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, targets, output[1])


def _autograd(ctx, dloss: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dx, dweight = linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.implementation)
    return dx, dweight, None, None


_linear_cross_entropy.register_autograd(_autograd, setup_context=_setup_context)


def _loss_rows_torch(logits: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a chunk, and the gradient of their sum by `factors` in its logits."""
    dtype = logits.dtype
    logits = logits.to(wide(logits))
    lse = logits.logsumexp(-1)
    index, valid = inside(targets, logits.shape[1])
    picked = torch.where(valid, logits.gather(1, index), math.nan).squeeze(1)
    return lse - picked, dlogits_of(logits, targets, lse, factors).to(dtype)


def _loss_rows_native(logits: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The same in C++, in the place of the logits."""
    losses, lse = torch.empty_like(factors), torch.empty_like(factors)
    rows_native(logits, targets, factors.contiguous(), losses, lse)
    return losses, logits


@torch.library.custom_op("dar::linear_cross_entropy_summed", mutates_args=())
def _linear_cross_entropy_summed(
    x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of `factors` `[M]` times the losses, and its gradients in `x` and `weight`.

    `weight` may be wider than `x`, as under autocast: its gradient is not rounded in between.
    """
    loss_rows = {"native": _loss_rows_native, "torch": _loss_rows_torch}[implementation]
    x, targets = contiguous_last(x), targets.contiguous()
    low = contiguous_last(weight).to(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.zeros((), dtype=wide(x), device=x.device)
    dweight = torch.zeros(weight.shape, dtype=total.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for rows in chunks(x, weight):
            part, factor = x[rows], factors[rows]
            losses, dlogits = loss_rows(part @ low.T, targets[rows], factor)
            total += torch.where(factor == 0, 0, factor * losses).sum()
            add_gradients(dlogits, part, low, dx[rows], dweight)
    return total, dx, dweight.to(weight.dtype)


@_linear_cross_entropy_summed.register_fake
def _(
    x: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=wide(x)), x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_gradients(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], output[2])


def _scale_gradients(
    ctx, dtotal: Tensor | None, *_: Tensor
) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    if dtotal is None:
        return None, None, None, None, None
    dx, dweight = ctx.saved_tensors
    return dx * dtotal.to(dx.dtype), dweight * dtotal.to(dweight.dtype), None, None, None


_linear_cross_entropy_summed.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def variants(shape: Shape) -> Iterator[Variant]:
    """Forward and backward tiles of the head, in bf16 and fp32; the tiles differ by chip."""
    if not isinstance(shape, DecoderShape):
        return
    for name, dtype, architectures in (
        ("bf16", torch.bfloat16, (80,)),
        ("bf16", torch.bfloat16, (90,)),
        ("fp32", torch.float32, (80, 90)),
    ):
        launch = tiles_for(dtype, architectures[0])
        common = dict.fromkeys(("x_ptr", "weight_ptr"), f"*{name}")
        common |= {"targets_ptr": "*i64", "lse_ptr": "*fp32"}
        common |= dict.fromkeys(("stride_xm", "stride_wv", "M", "V", "D"), "i32")
        for kernel, own in (
            (_lse_kernel, {"picked_ptr": "*fp32"}),
            (dlogits_kernel, {"dloss_ptr": "*fp32", "dlogits_ptr": f"*{name}"}),
        ):
            yield Variant(
                kernel=kernel, signature=common | own, constants=launch.constants(shape.dim),
                aligned=("stride_xm", "stride_wv", "V", "D"), options=launch.options,
                architectures=architectures,
            )  # fmt: skip


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean",
    ignore_index: int | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of the logits x Wᵀ, which are made in chunks and never stored.

    Under autocast `x` and `weight` are cast as torch.nn.functional.linear would. Targets out of
    range raise on a CPU in eager mode; elsewhere their loss is NaN.

    Args:
        x: `[M, D]` fp32, fp16, bf16 or (torch) fp64.
        weight: `[V, D]`, of the dtype and on the device of `x`.
        targets: `[M]` int64 in [0, V), or `ignore_index`.
        reduction: `mean` over the rows that are not ignored, `sum`, or `none`.
        ignore_index: rows with this target have loss 0 and no gradient.
        implementation: `triton` (CUDA), `native` (CPU, fp32 or bf16) or `torch`; None: the first
            that can run.

    Returns:
        fp32 (fp64 for fp64): a scalar, or `[M]` for `none`. Differentiable in `x` and `weight`.

    Raises:
        TypeError: where an argument is of the wrong type or dtype.
        ValueError: where shapes, devices or ranges do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: expected reduction one of {REDUCTIONS}, got {reduction!r}"
        )
    check_tensor(OP.name, "x", x, ("M", Dim("D")))
    (M, D), device = x.shape, x.device
    check_tensor(OP.name, "weight", weight, (Dim("V"), D), dtypes_beside(x), device)
    check_tensor(OP.name, "targets", targets, (M,), (torch.int64,), device)
    kept = None if ignore_index is None else targets != ignore_index
    check_below(OP.name, "targets", targets, len(weight), kept)
    given = weight
    x, weight = lowered(x, weight)
    chosen = OP.pick(device.type, x.dtype, implementation)
    if chosen != "triton" and reduction != "none" and M and needs_grad(x, weight):
        factors = torch.ones(M, dtype=wide(x), device=device) if kept is None else kept.to(wide(x))
        if reduction == "mean":
            factors = factors / factors.sum()
        summed: Tensor = _linear_cross_entropy_summed(x, given, targets, factors, chosen)[0]
        return summed
    loss: Tensor = _linear_cross_entropy(x, weight, targets, chosen)[0]
    if kept is not None:
        loss = torch.where(kept, loss, 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if kept is None else loss.sum() / kept.sum()
