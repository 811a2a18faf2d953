"""flash-attn-4 under torch.compile: its kernels as opaque ops with a fake and a gradient.

Its own autograd function builds kernels as it runs, which a compiler cannot trace. Costs what the
kernels cost; the log-sum-exp, 4·B·H·Nq bytes, is saved for the gradients.
Source: package flash-attn-4, flash_attn/cute/interface.py (4.0.0b36).
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def _interface() -> Any:
    return import_module("flash_attn.cute.interface")


@torch.library.custom_op("dar::flash_attention_4", mutates_args=())
def _flash_attention_4(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse = _interface()._flash_attn_fwd(
        q, k, v, softmax_scale=scale, causal=causal, return_lse=True
    )[:2]
    return out, lse


@_flash_attention_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, N), dtype=torch.float32)


@torch.library.custom_op("dar::flash_attention_4_backward", mutates_args=())
def _flash_attention_4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = _interface()._flash_attn_bwd(
        q, k, v, out, dout.contiguous(), lse, softmax_scale=scale, causal=causal
    )[:3]
    return dq, dk, dv


@_flash_attention_4_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None, None]:
    gradients = _flash_attention_4_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *gradients, None, None


_flash_attention_4.register_autograd(_backward, setup_context=_setup_context)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention of q `[B, Nq, H, Dh]` over k and v `[B, Nk, Hkv, Dh]`, fp16 or bf16 on CUDA.

    `causal`: from the bottom right corner.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = _flash_attention_4(q, k, v, scale, causal)[0]
        return traced
    y = import_module("flash_attn.cute").flash_attn_func(
        q, k, v, softmax_scale=scale, causal=causal
    )
    out: Tensor = y[0] if isinstance(y, tuple) else y  # with the log-sum-exp
    return out


__all__ = ["flash_attention_4"]
