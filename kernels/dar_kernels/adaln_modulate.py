"""m = features·weightᵀ + bias, D to 6 D; modulated = LN(x)·(1 + scale_a) + shift_a; the rest of m.

Compute bound: 12·M·D² FLOPs for M rows. Reads features and x (x again for its statistics), writes
modulated and four chunks of m: 8·M·D·itemsize bytes beside 6·D²·itemsize of weight, which stays in
cache. In two steps it would be 11·M·D: shift_a and scale_a never reach memory, because the program
that has their columns as accumulators normalises the same columns of x.
Backward computes scale_a again: 2·M·D² of its 26·M·D² FLOPs, and no byte is saved but the inputs.
Source: D-AR (arXiv 2505.23660), §3.2, the adaptive norm of the pixel DiT.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import modulate_native
from dar_kernels.adaln_modulate_triton import launch, variants
from dar_kernels.checks import check_alike, check_tensor, dtypes_beside, lowered
from dar_kernels.dispatch import Op, needs_grad
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.layer_norm_modulate import (
    layer_norm_modulate,
    layer_norm_modulate_backward,
    layer_norm_modulate_ref,
)
from dar_kernels.layer_norm_rows import TOKENS
from dar_kernels.linear import Fp8Weight, PackedWeight, linear
from dar_kernels.rows import matrix_of


class AdaLNModulate(NamedTuple):
    """The input of the first branch, its gate, and the second branch's modulation, `[B, N, D]`."""

    modulated: Tensor
    gate_a: Tensor
    shift_m: Tensor
    scale_m: Tensor
    gate_m: Tensor


def adaln_modulate_ref(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> AdaLNModulate:
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    shift, scale, *rest = F.linear(features, weight, bias).chunk(6, dim=-1)
    return AdaLNModulate(layer_norm_modulate_ref(x, shift, scale), *rest)


@torch.library.custom_op("dar::adaln_modulate", mutates_args=())
def _adaln_modulate(
    x: Tensor, features: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """modulated `[B, N, D]`, and gate_a, shift_m, scale_m, gate_m side by side `[B, N, 4 D]`."""
    modulated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = x.new_empty((*x.shape[:-1], 4 * x.shape[-1]))
    rows = matrix_of(x), matrix_of(features), matrix_of(weight)
    launch(*rows, bias.contiguous(), modulated, rest)
    return modulated, rest


@_adaln_modulate.register_fake
def _(x: Tensor, features: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 4 * x.shape[-1]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, dmodulated: Tensor, drest: Tensor) -> tuple[Tensor | None, ...]:
    x, features, weight, bias = ctx.saved_tensors
    D = x.shape[-1]
    rows = features.reshape(-1, D)
    scale = torch.addmm(bias[D : 2 * D], rows, weight[D : 2 * D].T).view(x.shape)
    dx, dpair = layer_norm_modulate_backward(dmodulated, x, scale, True)
    dpair, drest = dpair.view(-1, 2 * D), drest.reshape(-1, 4 * D)
    dfeatures = torch.addmm(dpair @ weight[: 2 * D], drest, weight[2 * D :]).view(x.shape)
    dweight = torch.cat((dpair.T @ rows, drest.T @ rows))
    return dx, dfeatures, dweight, torch.cat((dpair.sum(0), drest.sum(0)))


_adaln_modulate.register_autograd(_autograd, setup_context=_setup_context)

OP = Op(
    name="adaln_modulate",
    implementations=(
        by_triton(_adaln_modulate),
        by_native(modulate_native.adaln_modulate, modulate_native.NATIVE_DTYPES),
        by_torch(adaln_modulate_ref),
    ),
)


def adaln_modulate(
    x: Tensor,
    features: Tensor,
    weight: Tensor | PackedWeight | Fp8Weight,
    bias: Tensor,
    *,
    implementation: str | None = None,
) -> AdaLNModulate:
    """The adaptive norm of a block: its first branch's input, and the rest of its modulation.

    Args:
        x: `[B, N, D]`, floating point, 1 ≤ D ≤ 16384: the residual stream.
        features: `[B, N, D]`: what the projection reads, of the dtype and on the device of `x`.
        weight, bias: `[6 D, D]`, which may be packed, and `[6 D]`: the projection; rows in the
            order shift, scale, gate of the first branch, then of the second. In fp8 it is a product
            of its own, by the library, and `implementation` is that of `layer_norm_modulate`.
        implementation: `triton` (CUDA, not fp64), `native` (CPU, fp32 and bf16, without gradients)
            or `torch`; None: the first that can run.

    Returns:
        modulated and four views of one tensor, in the dtype of `x`. Differentiable. Under autocast
        `triton` runs in its dtype.

    Raises:
        TypeError: where an argument is no floating point tensor, or dtypes differ.
        ValueError: where shapes or devices do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    check_alike("adaln_modulate", x, TOKENS, features=features)
    D, dtypes = x.shape[-1], dtypes_beside(x)
    plain = weight if isinstance(weight, Tensor) else weight.weight
    check_tensor("adaln_modulate", "weight", plain, (6 * D, D), dtypes, x.device)
    check_tensor("adaln_modulate", "bias", bias, (6 * D,), dtypes, x.device)
    if isinstance(weight, Fp8Weight):
        shift, scale, *rest = linear(features, weight, bias).chunk(6, dim=-1)
        modulated = layer_norm_modulate(x, shift, scale, implementation=implementation)
        return AdaLNModulate(modulated, *rest)
    grad = needs_grad(x, features, plain, bias) or modulate_native.blocked(x.device.type)
    chosen = OP.pick(x.device.type, x.dtype, implementation, grad)
    if chosen == "torch":
        return adaln_modulate_ref(x, features, plain, bias)
    if chosen == "native":
        modulated, others = modulate_native.adaln_modulate(x, features, weight, bias)
    else:
        modulated, others = _adaln_modulate(*lowered(x, features, plain, bias))
    return AdaLNModulate(modulated, *others.chunk(4, dim=-1))


__all__ = ["OP", "AdaLNModulate", "adaln_modulate", "adaln_modulate_ref", "variants"]
