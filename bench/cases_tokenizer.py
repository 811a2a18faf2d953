"""Cases of the tokenizer: `batch` pictures of N patches in the pixel DiT, TOKENS codes each."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dar_kernels as ops
from dar_kernels.aot import DenoiserShape
from dar_kernels.flow_step import flow_step as flow_step_op
from kernel_cases import FLOAT, HALF, TOKENS, Case, Make, attention, case, rotation


@case(DenoiserShape, "rope_2d DiT")
def rope_dit(s: DenoiserShape, B: int, make: Make) -> Case:
    return rotation(B, s.patches, s.heads, s.head_dim, make)


@case(DenoiserShape, "attention DiT")
def patch_attention(s: DenoiserShape, B: int, make: Make) -> Case:
    return attention(B, s.heads, s.heads, s.patches, s.head_dim, None, make)


@case(DenoiserShape, "attention encoder")
def prefix_attention(s: DenoiserShape, B: int, make: Make) -> Case:
    """Patches blind to TOKENS queries, which are causal; heads as many as the DiT's."""
    return attention(B, s.heads, s.heads, s.patches + TOKENS, s.head_dim, s.patches, make)


@case(DenoiserShape, "layer_norm tokens")
def layer_norm(s: DenoiserShape, B: int, make: Make) -> Case:
    size = B * s.patches * s.dim
    x = make(B, s.patches, s.dim)
    return Case(
        shape=f"[{B}, {s.patches}, {s.dim}]", bytes=2 * size * HALF, backward=(3 * size * HALF, 0),
        run=lambda i: ops.layer_norm(x, implementation=i),
        library=("F.layer_norm", lambda: F.layer_norm(x, (s.dim,), eps=1e-6)),
    )  # fmt: skip


@case(DenoiserShape, "layer_norm heads")
def layer_norm_heads(s: DenoiserShape, B: int, make: Make) -> Case:
    size = B * s.patches * s.dim
    x = make(B, s.patches, s.heads, s.head_dim).transpose(1, 2)
    affine = make(s.head_dim), make(s.head_dim)
    return Case(
        shape=f"[{B}, {s.heads}, {s.patches}, {s.head_dim}]", bytes=2 * size * HALF,
        backward=(3 * size * HALF, 0),
        run=lambda i: ops.layer_norm(x, *affine, implementation=i),
        library=("F.layer_norm", lambda: F.layer_norm(x, (s.head_dim,), *affine, 1e-6)),
    )  # fmt: skip


def features_of(s: DenoiserShape, B: int, make: Make) -> tuple[Any, int, int]:
    """The call of adaln_cross_attention on a given x, its bytes and FLOPs."""
    N, D, H, Q, Dh = s.patches, s.dim, s.heads, s.condition_tokens, s.head_dim
    weights = make(D, D), make(D), make(Dh), make(Dh)
    rows = make(B, H, Q, Dh), make(B, H, Q, D), make(D), make(B, D)
    tables = make.tables(N, Dh)
    moved = (2 * N * D + 2 * N * H * Q + H * Q * D + N * D) * B * HALF + D * D * HALF
    flops = 2 * B * N * D * (D + Q) + 2 * B * N * H * Q * D

    def call(x: Tensor, i: str) -> Tensor:
        return ops.adaln_cross_attention(x, *weights, *rows, *tables, implementation=i)

    return call, moved, flops


@case(DenoiserShape)
def adaln_cross_attention(s: DenoiserShape, B: int, make: Make) -> Case:
    x = make(B, s.patches, s.dim)
    call, moved, flops = features_of(s, B, make)
    return Case(
        shape=f"[{B}, {s.patches}, {s.dim}] over {s.condition_tokens}", bytes=moved, flops=flops,
        backward=(2 * moved, 2 * flops), run=lambda i: call(x, i),
    )  # fmt: skip


def modulation(s: DenoiserShape, B: int) -> tuple[int, int]:
    M, D = B * s.patches, s.dim
    return (8 * M * D + 6 * D * D) * HALF, 12 * M * D * D


@case(DenoiserShape)
def adaln_modulate(s: DenoiserShape, B: int, make: Make) -> Case:
    D = s.dim
    x, features = make(B, s.patches, D), make(B, s.patches, D)
    weight, bias = make(6 * D, D), make(6 * D)
    moved, flops = modulation(s, B)
    return Case(
        shape=f"[{B}, {s.patches}, {D}] to {6 * D}", bytes=moved, flops=flops,
        backward=(2 * moved, 13 * flops // 6),
        run=lambda i: ops.adaln_modulate(x, features, weight, bias, implementation=i),
        library=("cuBLAS product alone", lambda: F.linear(features, weight, bias)),
    )  # fmt: skip


@case(DenoiserShape, "adaln_cross_attention + adaln_modulate")
def adaln(s: DenoiserShape, B: int, make: Make) -> Case:
    D = s.dim
    x, weight, bias = make(B, s.patches, D), make(6 * D, D), make(6 * D)
    call, moved, flops = features_of(s, B, make)
    more, product = modulation(s, B)
    return Case(
        shape=f"[{B}, {s.patches}, {D}]", bytes=moved + more, flops=flops + product,
        backward=(2 * (moved + more), 2 * flops + 13 * product // 6),
        run=lambda i: ops.adaln_modulate(x, call(x, i), weight, bias, implementation=i),
    )  # fmt: skip


@case(DenoiserShape)
def layer_norm_modulate(s: DenoiserShape, B: int, make: Make) -> Case:
    size = B * s.patches * s.dim
    x, both = make(B, s.patches, s.dim), make(B, s.patches, 2 * s.dim)
    shift, scale = both.chunk(2, -1)
    return Case(
        shape=f"[{B}, {s.patches}, {s.dim}]", bytes=4 * size * HALF, backward=(5 * size * HALF, 0),
        run=lambda i: ops.layer_norm_modulate(x, shift, scale, implementation=i),
    )  # fmt: skip


@case(DenoiserShape)
def gate_residual_modulate(s: DenoiserShape, B: int, make: Make) -> Case:
    size = B * s.patches * s.dim
    x, y = (make(B, s.patches, s.dim) for _ in range(2))
    gate, shift, scale = make(B, s.patches, 3 * s.dim).chunk(3, -1)
    return Case(
        shape=f"[{B}, {s.patches}, {s.dim}]", bytes=7 * size * HALF,
        backward=(10 * size * HALF, 0),
        run=lambda i: ops.gate_residual_modulate(x, y, gate, shift, scale, implementation=i),
    )  # fmt: skip


@case(DenoiserShape)
def normed_attention(s: DenoiserShape, B: int, make: Make) -> Case:
    N, D, H = s.patches, s.dim, s.heads
    q, k, v = make(B, N, 3 * D).chunk(3, -1)
    norms = [make(s.head_dim) for _ in range(4)]
    tables = make.tables(N, s.head_dim)
    heads = [make(B, H, N, s.head_dim) for _ in range(3)]
    return Case(
        shape=f"[{B}, {N}, {D}]", bytes=4 * B * N * D * HALF, flops=4 * B * N * N * D,
        run=lambda i: ops.normed_attention(q, k, v, *norms, *tables, implementation=i),
        library=("SDPA alone", lambda: F.scaled_dot_product_attention(*heads)),
    )  # fmt: skip


@case(DenoiserShape)
def flow_step(s: DenoiserShape, B: int, make: Make) -> Case:
    N, P = s.patches, s.patch_size
    R = math.isqrt(N) * P
    x, previous = (make(B, 3, R, R, dtype=torch.float32) for _ in range(2))
    velocity = make(B, N, 3 * P * P)
    return Case(
        shape=f"[{B}, 3, {R}, {R}]", bytes=x.numel() * (5 * FLOAT + HALF),
        run=lambda i: flow_step_op(
            x, velocity, previous, 0.5, 0.6, 0.6, "adams2", P, implementation=i),
    )  # fmt: skip


def unfused_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """The expression of the official quantizer, which makes [M, V]."""
    z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    square = z.square().sum(1, keepdim=True) + codebook.square().sum(1)
    return (square - 2 * z @ codebook.T).argmin(1)


@case(DenoiserShape, "vq_nearest fp32")
def vq_nearest(s: DenoiserShape, B: int, make: Make) -> Case:
    M, V, C = B * TOKENS, s.codebook_size, s.code_dim
    z, codebook = (make(n, C, dtype=torch.float32) for n in (M, V))
    return Case(
        shape=f"[{M}, {C}] over {V}", bytes=(M + V) * C * FLOAT + 8 * M, flops=2 * M * V * C,
        precision=torch.float32,
        run=lambda i: ops.vq_nearest(z, codebook, implementation=i),
        library=("the expression that makes [M, V]", lambda: unfused_nearest(z, codebook)),
    )  # fmt: skip


@case(DenoiserShape)
def vq_losses(s: DenoiserShape, B: int, make: Make) -> Case:
    M, V, C = B * TOKENS, s.codebook_size, s.code_dim
    z, codebook, codes = make(M, C), make(V, C), make.integers(V, M)
    forward = M * (C * HALF + C * HALF + C * FLOAT + 8 + 2 * FLOAT)
    return Case(
        shape=f"[{M}, {C}] of {V}", bytes=forward,
        backward=(M * (5 * C * HALF + C * FLOAT + 16) + 2 * V * C * HALF, 0),
        run=lambda i: ops.vq_losses(z, codebook, codes, implementation=i),
    )  # fmt: skip
