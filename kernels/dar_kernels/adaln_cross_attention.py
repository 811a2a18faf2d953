"""y = silu(time + out_bias + sum_h p_h V'_h): what the AdaLN projection of a DiT block reads.

    q = rope(LN_head(LN(x) Wq^T + bq)),  p_h = softmax(q_h k_h^T / sqrt(Dh)) over a group's Q keys
    V'_h = V_h Wo_h^T: the output projection absorbed, exact, 2 N HQ D FLOPs in place of 2 N D D

Three launches: mean and 1/std of each row of x; P [B, N, H Q], a product with Wq whose tiles are
normalised on the way in and whose heads are normalised, rotated and scored before they leave the
chip; y, a product of P and V'. A picture of tokenizer v1 (N 1024, D 768, H 12, Q 32) costs
1208 + 101 + 604 MFLOP and 6.9 MB in bf16 (x twice, P twice, V', y): 2.1 us of memory at 3.35 TB/s
and 2.4 us of arithmetic at 800 TFLOP/s. Unfused it is 2.5 GFLOP and 19 MB.

One launch over all heads was weighed: 64 patches need an accumulator of 64 x 768 fp32, 192
registers a thread, beside the queries; every program reads Wq and V' whole, 64 FLOP a byte of the
second-level cache; and a single picture fills 16 of 132 multiprocessors. Here it fills 96, and the
1.6 MB that P costs stay in that cache at small batch. Source: arXiv 2505.23660, §3.2.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import adaln_cross_attention_backward as backward
from dar_kernels import adaln_cross_attention_forward as forward
from dar_kernels import modulate_native
from dar_kernels.adaln_cross_attention_tiles import NORM_EPS
from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.checks import Dim, check_tensor, dtypes_beside, lowered
from dar_kernels.dispatch import Op, needs_grad
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.linear import Fp8Weight, PackedWeight

MAX_DIM, MAX_HEAD_DIM, MAX_KEYS = 8192, 64, 64  # what Triton keeps in registers


def adaln_cross_attention_ref(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor,
    keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor, cos: Tensor, sin: Tensor,
) -> Tensor:  # fmt: skip
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    B, N, D = x.shape
    head_dim = keys.shape[-1]
    q = F.linear(F.layer_norm(x, (D,), eps=NORM_EPS), q_weight, q_bias).view(B, N, -1, head_dim)
    q = F.layer_norm(q, (head_dim,), q_norm_weight, q_norm_bias, NORM_EPS).transpose(1, 2)
    even, odd = q.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    scores = rotated.flatten(-2).to(q.dtype) @ keys.mT * head_dim**-0.5  # [B, H, N, Q]
    probs = scores.softmax(-1).transpose(1, 2).flatten(2)  # [B, N, H Q]
    shift = (time + out_bias)[:, None]  # their gradients share one sum over the patches
    return F.silu(torch.baddbmm(shift, probs, values_out.flatten(1, 2)))


def absorb_output(values: Tensor, proj_weight: Tensor) -> Tensor:
    """V'_h = V_h Wo_h^T, so that the sum over heads of p_h V'_h is the projected attention.

    Args:
        values: `[B, H, Q, Dh]`, floating point.
        proj_weight: `[D, D]`, weight of the output projection, D = H Dh.

    Returns:
        `[B, H, Q, D]`. Differentiable in both.

    Raises:
        TypeError: where an argument is no floating-point tensor.
        ValueError: where shapes do not fit.
    """
    check_tensor("absorb_output", "values", values, ("B", "H", "Q", "Dh"))
    B, H, Q, head_dim = values.shape
    D = H * head_dim
    check_tensor("absorb_output", "proj_weight", proj_weight, (D, D))
    by_head = proj_weight.mT.reshape(H, head_dim, D)
    rows = values.transpose(0, 1).reshape(H, B * Q, head_dim)
    return torch.bmm(rows, by_head).view(H, B, Q, D).transpose(0, 1)


@torch.library.custom_op("dar::adaln_cross_attention", mutates_args=())
def _adaln_cross_attention(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor,
    keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and for the backward P and the statistics of the rows of x."""
    probs, stats = forward.launch_probabilities(
        x, q_weight, q_bias, q_norm_weight, q_norm_bias, keys, cos, sin
    )
    y, _ = forward.launch_output(probs, values_out, out_bias, time, None)
    return y, probs, stats


@_adaln_cross_attention.register_fake
def _(
    x: Tensor, q_weight: Tensor, q_bias: Tensor, q_norm_weight: Tensor, q_norm_bias: Tensor,
    keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, N, D = x.shape
    probs = q_weight.new_empty(B, N, keys.shape[1] * keys.shape[2])
    return q_weight.new_empty(B, N, D), probs, x.new_empty(2, B * N, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])


def _autograd(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*backward.attention_backward(dy, *ctx.saved_tensors), None, None)


_adaln_cross_attention.register_autograd(_autograd, setup_context=_setup_context)


OP = Op(
    name="adaln_cross_attention",
    implementations=(
        by_triton(_adaln_cross_attention),
        by_native(modulate_native.adaln_cross_attention, modulate_native.NATIVE_DTYPES),
        by_torch(adaln_cross_attention_ref),
    ),
)


def variants(shape: Shape) -> Iterator[Variant]:
    """What is launched for a denoiser of this shape; nothing for a decoder."""
    if isinstance(shape, DenoiserShape):
        yield from forward.variants(shape)
        yield from backward.variants(shape)


def adaln_cross_attention(
    x: Tensor, q_weight: Tensor | PackedWeight | Fp8Weight, q_bias: Tensor, q_norm_weight: Tensor,
    q_norm_bias: Tensor, keys: Tensor, values_out: Tensor, out_bias: Tensor, time: Tensor,
    cos: Tensor, sin: Tensor, *, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """silu(time + cross attention of LN(x) over a group's Q keys, projected). LN eps is 1e-6.

    Under autocast `triton` uses all but x, cos and sin in autocast's dtype, which y has too.

    Args:
        x: `[B, N, D]`, floating point; all tensors but the tables have its dtype unless autocast.
        q_weight, q_bias: `[D, D]`, which may be packed, and `[D]`: the query projection.
        q_norm_weight, q_norm_bias: `[Dh]`, of the LayerNorm on each head of q; Dh even.
        keys: `[B, H, Q, Dh]`, normalised, H Dh = D.
        values_out: `[B, H, Q, D]` of `absorb_output`; rows of D contiguous, or they are copied.
        out_bias: `[D]`, of the output projection.
        time: `[B, D]`, the time embedding.
        cos, sin: `[N, Dh / 2]` fp32, of the interleaved pairs.
        implementation: `triton` (CUDA, not fp64; D <= 8192, Dh and Q <= 64), `native` (CPU, fp32
            and bf16, without gradients) or `torch`; None: the first that takes the sizes and can
            run.

    Returns:
        `[B, N, D]`. Differentiable in all but cos and sin.

    Raises:
        TypeError: where an argument is no floating-point tensor, or dtypes differ.
        ValueError: where shapes, sizes or devices do not fit, or no implementation has that name.
        UnavailableError: where the named implementation cannot run here.
    """
    op = "adaln_cross_attention"
    weight = q_weight if isinstance(q_weight, Tensor) else q_weight.weight
    if isinstance(q_weight, Fp8Weight):
        q_weight = weight  # the kernels have this product within: it stays in the dtype of x
    check_tensor(op, "x", x, (Dim("B"), Dim("N"), Dim("D")))
    B, N, D = x.shape
    dtypes, device = dtypes_beside(x), x.device
    check_tensor(op, "keys", keys, (B, Dim("H"), Dim("Q"), Dim("Dh")), dtypes, device)
    H, Q, Dh = keys.shape[1:]
    if H * Dh != D or Dh % 2:
        raise ValueError(f"{op}: expected keys of H Dh = {D}, Dh even, got {list(keys.shape)}")
    inputs = {
        "q_weight": (weight, (D, D)), "q_bias": (q_bias, (D,)),
        "q_norm_weight": (q_norm_weight, (Dh,)), "q_norm_bias": (q_norm_bias, (Dh,)),
        "values_out": (values_out, (B, H, Q, D)), "out_bias": (out_bias, (D,)),
        "time": (time, (B, D)),
    }  # fmt: skip
    for name, (tensor, shape) in inputs.items():
        check_tensor(op, name, tensor, shape, dtypes, device)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(op, name, table, (N, Dh // 2), (torch.float32,), device)
    small = N * max(D, H * Q) < 2**31  # offsets within a picture are int32
    fits = D <= MAX_DIM and Dh <= MAX_HEAD_DIM and Q <= MAX_KEYS and small
    if implementation == "triton" and not fits:
        raise ValueError(
            f"{op}: expected D <= {MAX_DIM}, Dh <= {MAX_HEAD_DIM}, Q <= {MAX_KEYS} and N max(D, "
            f"H Q) < 2^31 for triton, got D {D}, Dh {Dh}, Q {Q}, N {N}"
        )
    tensors = weight, q_bias, q_norm_weight, q_norm_bias, keys, values_out, out_bias, time
    grad = needs_grad(x, *tensors) or modulate_native.blocked(x.device.type)
    chosen = OP.pick(x.device.type, x.dtype, implementation, grad)
    if chosen == "native":
        return modulate_native.adaln_cross_attention(x, q_weight, *tensors[1:], cos, sin)
    if chosen == "torch" or not fits:
        return adaln_cross_attention_ref(x, *tensors, cos, sin)
    y: Tensor = _adaln_cross_attention(x, *lowered(*tensors), cos, sin)[0]
    return y
