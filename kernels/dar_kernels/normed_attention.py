"""softmax(rope(LN q) rope(LN k)^T / sqrt(Dh)) v, head by head: attention with norms on q and k.

Compute bound: 4·N²·D FLOPs a row of B. On CUDA the norm and the rotation are kernels of their own
and the attention is `attention`'s. On a CPU with AVX-512 BF16, without gradients and prefix, all of
it is one call: keys and values of a head are packed once into the second-level cache, scores never
leave the first.
Source: D-AR (arXiv 2505.23660), §3.1; online softmax from Milakov and Gimelshein (2018).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import native, triton_support
from dar_kernels.attention import attention, attention_is_named, attention_ref
from dar_kernels.checks import check_tensor
from dar_kernels.dispatch import Op, needs_grad
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.layer_norm import layer_norm
from dar_kernels.rope_2d import rope_2d

EPS = 1e-6
NATIVE_HEAD_DIMS = (16, 32, 64)


def normed_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, cos: Tensor | None, sin: Tensor | None, prefix: int | None = None,
) -> Tensor:  # fmt: skip
    """The definition, in whatever dtype it is given; in fp64 it is the truth the tests use."""
    q, k, v = (_heads(x, len(q_weight)) for x in (q, k, v))  # [B, H, N, Dh]
    q = F.layer_norm(q, q.shape[-1:], q_weight, q_bias, EPS)
    k = F.layer_norm(k, k.shape[-1:], k_weight, k_bias, EPS)
    if cos is not None and sin is not None:
        q, k = (
            _rotate(x, cos[-x.shape[2] :].to(x.dtype), sin[-x.shape[2] :].to(x.dtype))
            for x in (q, k)
        )
    return attention_ref(q, k, v, prefix).transpose(1, 2).flatten(2)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _library(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor,
    k_weight: Tensor, k_bias: Tensor, cos: Tensor | None, sin: Tensor | None,
    prefix: int | None = None, inner: str | None = None,
) -> Tensor:  # fmt: skip
    """Norm and rotation as ops of their own, then the back end of `attention` named `inner`."""
    q, k, v = (x.unflatten(-1, (-1, len(q_weight))) for x in (q, k, v))  # [B, N, H, Dh]
    q = layer_norm(q, q_weight, q_bias, EPS, implementation=implementation).transpose(1, 2)
    k = layer_norm(k, k_weight, k_bias, EPS, implementation=implementation).transpose(1, 2)
    v = v.transpose(1, 2)
    if cos is not None and sin is not None:
        queries = q.shape[2]
        q = rope_2d(q, cos[-queries:], sin[-queries:], implementation=implementation)
        k = rope_2d(k, cos, sin, implementation=implementation)
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast keeps a norm in fp32
    y = attention(q, k, v, prefix=prefix, implementation=inner)
    return y.transpose(1, 2).flatten(2)


@functools.cache
def _native_missing() -> str | None:
    reason = native.missing()
    if reason is None:
        from dar_kernels import _native

        if not _native.attention_supported(NATIVE_HEAD_DIMS[-1]):
            reason = "this processor has no AVX-512 BF16"
    return reason


def _compiled(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    """C++ on the CPU, kernels/csrc/attention_avx512bf16.cpp."""
    from dar_kernels import _native

    def norm(weight: Tensor) -> Tensor:
        return weight.detach().to(q.dtype).contiguous()

    def rows(x: Tensor) -> Tensor:
        return triton_support.contiguous_last(x.detach())

    y = torch.empty(q.shape, dtype=q.dtype)
    _native.attention(
        rows(q), rows(k), rows(v), norm(q_weight), norm(q_bias), norm(k_weight), norm(k_bias),
        None if cos is None else cos.contiguous(), None if sin is None else sin.contiguous(),
        y, EPS, torch.get_num_threads(),
    )  # fmt: skip
    return y


@torch.library.custom_op("dar::normed_attention", mutates_args=())
def _normed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    return _compiled(q, k, v, q_weight, q_bias, k_weight, k_bias, cos, sin)


@_normed_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, cos: Tensor | None, sin: Tensor | None,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


OP = Op(
    name="normed_attention",
    implementations=(
        by_triton(functools.partial(_library, "triton")),
        by_native(_compiled, (torch.bfloat16,), _native_missing),
        by_torch(functools.partial(_library, "torch")),
    ),
)


def normed_attention(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, q_bias: Tensor, k_weight: Tensor,
    k_bias: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *,
    prefix: int | None = None, implementation: str | None = None,
) -> Tensor:  # fmt: skip
    """Attention of `q` over `k` and `v` with a LayerNorm and a rotation on each head of q and k.

    Args:
        q, k, v: `[B, N, D]`, D = H·Dh, of one dtype (autocast aside); chunks of a wider tensor
            are read in place. With a prefix q may be `[B, n, D]`, the last n of the N positions.
        q_weight, q_bias, k_weight, k_bias: `[Dh]`.
        cos, sin: `[N, Dh / 2]` fp32, or None: no rotation. Pairs are interleaved.
        prefix: None: every query sees all keys; p: the one at i sees the keys before max(p, i + 1),
            so 0 is causal order. Not with `native`.
        implementation: `triton`, `native` (CPU with AVX-512 BF16, bf16, Dh 16, 32 or 64, without
            gradients or prefix) or `torch`, attention included; None: the first that can run, and
            the back end of `attention` that `require` names or its rule finds.

    Returns:
        As many rows as q. Differentiable but for `native`.

    Raises:
        TypeError: where an argument is no floating point tensor.
        ValueError: where shapes or devices do not fit, or `native` is named with a prefix.
        UnavailableError: where the named implementation cannot run here.
    """
    _check(q, k, v, (q_weight, q_bias, k_weight, k_bias), cos, sin, prefix)
    tensors = (q, k, v, q_weight, q_bias, k_weight, k_bias)
    special = prefix is not None or len(q_weight) not in NATIVE_HEAD_DIMS
    special = special or torch.is_autocast_enabled(q.device.type)
    if implementation == "native" and special:
        raise ValueError(
            "normed_attention: expected no prefix or autocast and a head width of "
            f"{NATIVE_HEAD_DIMS} for native, got width {len(q_weight)}, prefix {prefix}"
        )
    special = special or attention_is_named()
    chosen = OP.pick(q.device.type, q.dtype, implementation, needs_grad(*tensors) or special)
    if chosen == "native":
        if torch.compiler.is_compiling():  # a custom op costs 60 µs a call, which eager can spare
            return _normed_attention(*tensors, cos, sin)
        return _compiled(*tensors, cos, sin)
    inner = "torch" if implementation == "torch" else None
    return _library(chosen, *tensors, cos, sin, prefix, inner)


def _check(
    q: Tensor, k: Tensor, v: Tensor, norms: tuple[Tensor, ...], cos: Tensor | None,
    sin: Tensor | None, prefix: int | None,
) -> None:  # fmt: skip
    op = "normed_attention"
    check_tensor(op, "q", q, ("B", "N", "D"))
    B, n, D = q.shape
    check_tensor(op, "k", k, (B, n if prefix is None else "N", D), device=q.device)
    N = k.shape[1]
    check_tensor(op, "v", v, k.shape, device=q.device)
    if n > N:
        raise ValueError(f"{op}: expected at most {N} rows of q, those of k, got {n}")
    check_tensor(op, "q_weight", norms[0], ("Dh",), device=q.device)
    Dh = len(norms[0])
    if Dh < 2 or Dh % 2 or D % Dh:
        raise ValueError(f"{op}: expected q_weight [Dh], Dh even and dividing {D}, got [{Dh}]")
    for name, tensor in zip(("q_bias", "k_weight", "k_bias"), norms[1:], strict=True):
        check_tensor(op, name, tensor, (Dh,), device=q.device)
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: expected cos and sin, or neither")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            check_tensor(op, name, table, (N, Dh // 2), (torch.float32,), q.device)


__all__ = ["OP", "normed_attention", "normed_attention_ref"]
