"""Cases of the prior: R = 2·batch rows a decode step, both of guidance, behind TOKENS positions;
M = batch·TOKENS rows in training.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dar_kernels as ops
from dar_kernels.aot import DecoderShape
from dar_kernels.decode_step import NativeDecoder
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.decoder_weights import DecoderPages, DecoderWeights, LayerWeights
from dar_kernels.linear_cross_entropy import linear_cross_entropy
from dar_kernels.quantize import QuantizedWeight
from kernel_cases import FLOAT, HALF, TOKENS, Case, Make, attention, case, rotation


@case(DecoderShape)
def rms_norm_residual(s: DecoderShape, B: int, make: Make) -> Case:
    M, D = B * TOKENS, s.dim
    x, delta, weight = make(M, D), make(M, D), make(D)
    moved = 4 * M * D * HALF
    return Case(
        shape=f"[{M}, {D}]", bytes=moved, backward=(moved, 0),
        run=lambda i: ops.rms_norm_residual(x, delta, weight, implementation=i),
    )  # fmt: skip


@case(DecoderShape)
def swiglu(s: DecoderShape, B: int, make: Make) -> Case:
    M, H = B * TOKENS, s.hidden_dim
    gate, up = make(M, H), make(M, H)
    return Case(
        shape=f"[{M}, {H}]", bytes=3 * M * H * HALF, backward=(5 * M * H * HALF, 0),
        run=lambda i: ops.swiglu(gate, up, implementation=i),
    )  # fmt: skip


@case(DecoderShape, "rope_2d prior")
def rope_prior(s: DecoderShape, B: int, make: Make) -> Case:
    return rotation(B, TOKENS, s.heads, s.head_dim, make)


@case(DecoderShape, "attention prior")
def causal_attention(s: DecoderShape, B: int, make: Make) -> Case:
    return attention(B, s.heads, s.kv_heads, TOKENS, s.head_dim, 0, make)


@case(DecoderShape, "paged_attention float8", dtype=torch.float8_e4m3fn)
@case(DecoderShape, "paged_attention int8", dtype=torch.int8)
@case(DecoderShape)
def paged_attention(s: DecoderShape, B: int, make: Make, dtype: torch.dtype | None = None) -> Case:
    R, H, Hkv, Dh = 2 * B, s.heads, s.kv_heads, s.head_dim
    dtype = dtype or make.dtype
    q = make(R, H, Dh)
    pages, table = make.pages(s, R, dtype)
    lengths = torch.full((R,), TOKENS, device=make.device, dtype=torch.int32)
    keys, values = (make(R, Hkv, TOKENS, Dh) for _ in range(2))
    scale = FLOAT * (dtype.itemsize == 1)
    return Case(
        shape=f"[{R}, {H}, {Dh}] over {TOKENS}",
        bytes=2 * R * Hkv * TOKENS * (Dh * dtype.itemsize + scale) + 2 * R * H * Dh * HALF,
        flops=4 * R * H * TOKENS * Dh,
        run=lambda i: ops.paged_attention(q, pages, table, lengths, implementation=i),
        library=("SDPA without pages, bf16", lambda: F.scaled_dot_product_attention(
            q[:, :, None], keys, values, enable_gqa=H != Hkv)),
    )  # fmt: skip


@case(DecoderShape)
def qkv_rope_append(s: DecoderShape, B: int, make: Make) -> Case:
    R, wide = 2 * B, (s.heads + 2 * s.kv_heads) * s.head_dim
    qkv = make(R, wide)
    pages, table = make.pages(s, R, make.dtype)
    positions = torch.full((R,), TOKENS - 1, device=make.device, dtype=torch.int32)
    tables = make.tables(TOKENS, s.head_dim)
    return Case(
        shape=f"[{R}, {wide}]", bytes=2 * R * wide * HALF,
        run=lambda i: ops.qkv_rope_append(
            qkv, *tables, positions, pages, table, heads=s.heads, kv_heads=s.kv_heads,
            implementation=i),
    )  # fmt: skip


def weight_of(make: Make, O: int, D: int, dtype: torch.dtype) -> Tensor | QuantizedWeight:  # noqa: E741
    return make(O, D) if dtype.itemsize > 1 else make.byte_weight(O, D, dtype)


@case(DecoderShape, "linear_decode float8", dtype=torch.float8_e4m3fn)
@case(DecoderShape, "linear_decode int8", dtype=torch.int8)
@case(DecoderShape)
def linear_decode(s: DecoderShape, B: int, make: Make, dtype: torch.dtype | None = None) -> Case:
    R, D, wide = 2 * B, s.dim, (s.heads + 2 * s.kv_heads) * s.head_dim
    dtype = dtype or make.dtype
    x, norm, weight, plain = make(R, D), make(D), weight_of(make, wide, D, dtype), make(wide, D)
    return Case(
        shape=f"[{R}, {D}] to {wide}", bytes=wide * D * dtype.itemsize + R * (D + wide) * HALF,
        flops=2 * R * D * wide,
        run=lambda i: ops.linear_decode(x, weight, norm_weight=norm, implementation=i),
        library=("cuBLAS product alone, bf16", lambda: F.linear(x, plain)),
    )  # fmt: skip


@case(DecoderShape, "linear_decode_swiglu int8", dtype=torch.int8)
@case(DecoderShape)
def linear_decode_swiglu(
    s: DecoderShape, B: int, make: Make, dtype: torch.dtype | None = None
) -> Case:
    R, D, H = 2 * B, s.dim, s.hidden_dim
    dtype = dtype or make.dtype
    x, norm, both = make(R, D), make(D), make(2 * H, D)
    gate, up = (weight_of(make, H, D, dtype) for _ in range(2))
    return Case(
        shape=f"[{R}, {D}] to {H}", bytes=2 * H * D * dtype.itemsize + R * (D + H) * HALF,
        flops=4 * R * D * H,
        run=lambda i: ops.linear_decode_swiglu(x, gate, up, norm_weight=norm, implementation=i),
        library=("cuBLAS product alone, bf16", lambda: F.linear(x, both)),
    )  # fmt: skip


@case(DecoderShape, "guided_sample top-k, top-p", top_k=600, top_p=0.9)
@case(DecoderShape)
def guided_sample(s: DecoderShape, B: int, make: Make, **filters: Any) -> Case:
    V = s.vocab_size
    logits, uncond = make(B, V), make(B, V)
    seeds, positions = make.integers(2**40, B), make.integers(TOKENS, B)
    return Case(
        shape=f"[{B}, {V}]", bytes=2 * B * V * HALF,
        run=lambda i: ops.guided_sample(
            logits, uncond, seeds, positions, guidance_scale=4.0, implementation=i, **filters),
    )  # fmt: skip


@case(DecoderShape, "linear_cross_entropy")
def cross_entropy(s: DecoderShape, B: int, make: Make) -> Case:
    M, D, V = B * TOKENS, s.dim, s.vocab_size
    x, weight, targets = make(M, D), make(V, D), make.integers(V, M)
    once = 2 * M * V * D
    return Case(
        shape=f"[{M}, {D}] to {V}", bytes=(M + V) * D * HALF, flops=once,
        backward=(2 * (M + V) * D * HALF, 3 * once),
        run=lambda i: linear_cross_entropy(x, weight, targets, implementation=i),
        library=("logits in memory", lambda: F.cross_entropy(F.linear(x, weight).float(), targets)),
    )  # fmt: skip


@case(DecoderShape)
def decode_step(s: DecoderShape, B: int, make: Make) -> Case:
    """One layer and the head, at the last position."""
    R, D, H = 2 * B, s.dim, s.hidden_dim
    qkv = (s.heads + 2 * s.kv_heads) * s.head_dim
    layer = LayerWeights(
        make(D), make(qkv, D), make(D, D), make(D), make(H, D), make(H, D), make(D, H)
    )
    head = make(s.vocab_size, D)
    weights = DecoderWeights(
        [layer], make(D), head, head, *make.tables(TOKENS, s.head_dim), s.heads, s.kv_heads
    )
    own, table = make.pages(s, R, make.dtype)
    pages = DecoderPages(own.keys[None], own.values[None])
    x, at = make(R, D), make.integers(1, R) + TOKENS - 1
    numbers = sum(w.numel() for w in (*layer.products(), head))
    cached = 2 * R * TOKENS * s.kv_heads * s.head_dim
    native = functools.cache(lambda: NativeDecoder(weights))  # it has no ops to be a sequence of

    def run(implementation: str) -> Tensor:
        if implementation == "native":
            return native().logits(x.float(), pages, table, at)
        return decode_step_by_ops(weights, x, pages, table, at, implementation)

    return Case(
        shape=f"[{R}, {D}], one layer and the head", bytes=(numbers + cached) * HALF,
        flops=2 * R * numbers,
        run=run,
    )  # fmt: skip
