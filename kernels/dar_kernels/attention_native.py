"""softmax(q k^T / sqrt(Dh)) v and its gradients in C++: bf16 on a CPU with AVX-512 BF16.

Compute bound: 4·Dh FLOPs for each query and key it sees forward, 10·Dh backward. Scores stay in the
first-level cache and are made again for the gradients, from the logarithm of each query's sum; keys
that no query of a tile sees are left out, not masked. Sums are fp32, and the same bits come
whatever the number of threads. kernels/csrc/attention_train_{forward,backward}.cpp.
Source: Dao, FlashAttention-2 (2023), algorithms 1 and 2.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dar_kernels import native
from dar_kernels.checks import Dim, check_tensor
from dar_kernels.triton_support import contiguous_last

HEAD_DIMS = tuple(range(16, 129, 16))
NAME = "attention_native"


class Gradients(NamedTuple):
    dq: Tensor  # [B, H, Nq, Dh]
    dk: Tensor  # [B, Hkv, Nk, Dh]
    dv: Tensor


@functools.cache
def missing() -> str | None:
    """Why it cannot run here and how to get it to; None where it can."""
    reason = native.missing()
    if reason is None:
        from dar_kernels import _native

        if not _native.attention_train_supported(HEAD_DIMS[0]):
            reason = "this processor has no AVX-512 BF16"
    return reason


def _tokens_first(x: Tensor) -> Tensor:
    """Uninitialised, of the shape [B, H, N, Dh] of `x`: tokens in memory as [B, N, H, Dh]."""
    B, H, N, Dh = x.shape
    return x.new_empty(B, N, H, Dh).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    return contiguous_last(x.detach())


def _seen(k: Tensor, prefix: int | None) -> int:
    return k.shape[2] if prefix is None else prefix


def _forward(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> tuple[Tensor, Tensor]:
    """Output `[B, H, Nq, Dh]` and log-sum-exp `[B, H, Nq]` fp32."""
    from dar_kernels import _native

    out, lse = _empty(q, k, v, prefix)
    _native.attention_train(
        _rows(q), _rows(k), _rows(v), out, lse, _seen(k, prefix), torch.get_num_threads()
    )
    return out, lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, prefix: int | None
) -> Gradients:
    from dar_kernels import _native

    gradients = Gradients(*(_tokens_first(x) for x in (q, k, v)))
    _native.attention_train_backward(
        _rows(q), _rows(k), _rows(v), out.detach(), lse.detach(), _rows(dout), *gradients,
        _seen(k, prefix), torch.get_num_threads(),
    )  # fmt: skip
    return gradients


def _empty(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> tuple[Tensor, Tensor]:
    return _tokens_first(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


class _Attention(torch.autograd.Function):
    """Eager: a custom op costs 60 µs a call."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> Tensor:
        out, lse = _forward(q, k, v, prefix)
        ctx.prefix = prefix
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(dout, q, k, v, out, lse, ctx.prefix), None


@torch.library.custom_op("dar::attention_cpu", mutates_args=())
def _attention_cpu(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, prefix)


_attention_cpu.register_fake(_empty)


@torch.library.custom_op("dar::attention_cpu_backward", mutates_args=())
def _attention_cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, prefix: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _backward(dout, q, k, v, out, lse, prefix)
    return dq, dk, dv


@_attention_cpu_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, prefix: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _tokens_first(q), _tokens_first(k), _tokens_first(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.prefix = inputs
    ctx.save_for_backward(q, k, v, *output)


def _autograd(ctx, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_attention_cpu_backward(dout, *ctx.saved_tensors, ctx.prefix), None


_attention_cpu.register_autograd(_autograd, setup_context=_setup_context)


def attention_native(q: Tensor, k: Tensor, v: Tensor, prefix: int | None = None) -> Tensor:
    """Attention of `q` over `k` and `v`, in bf16 on this processor.

    Args:
        q: `[B, H, Nq, Dh]` bf16, Dh of `HEAD_DIMS`. Read in place where the last dimension is
            contiguous.
        k, v: `[B, Hkv, Nk, Dh]`, Hkv dividing H, Nk ≥ Nq.
        prefix: None: every query sees all keys. p ≥ 0: the queries are the last Nq of the Nk
            positions, and the one at position i sees the keys before max(p, i + 1).

    Returns:
        `[B, H, Nq, Dh]`, a view of `[B, Nq, H, Dh]` in memory. Differentiable once.

    Raises:
        TypeError: where an argument is no bf16 tensor.
        ValueError: where shapes or devices do not fit, or the prefix is negative.
    """
    _check(q, k, v, prefix)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # which see operators only
        compiled: Tensor = _attention_cpu(q, k, v, prefix)[0]
        return compiled
    out: Tensor = _Attention.apply(q, k, v, prefix)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> None:
    bf16, cpu = (torch.bfloat16,), torch.device("cpu")
    check_tensor(NAME, "q", q, ("B", Dim("H"), "Nq", "Dh"), bf16, cpu)
    B, H, Nq, Dh = q.shape
    if Dh not in HEAD_DIMS:
        raise ValueError(f"{NAME}: expected Dh one of {HEAD_DIMS}, got {Dh}")
    check_tensor(NAME, "k", k, (B, Dim("Hkv", 1, H), Dim("Nk", Nq), Dh), bf16, cpu)
    check_tensor(NAME, "v", v, k.shape, bf16, cpu)
    if H % k.shape[1]:
        raise ValueError(f"{NAME}: expected Hkv dividing {H}, got {k.shape[1]}")
    if prefix is not None and prefix < 0:
        raise ValueError(f"{NAME}: expected prefix >= 0 or None, got {prefix}")


__all__ = ["HEAD_DIMS", "attention_native", "missing"]
