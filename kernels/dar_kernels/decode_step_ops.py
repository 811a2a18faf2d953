"""A decode step of a Llama decoder as a sequence of this library's ops: six launches a layer.

Norm with qkv, rotation with append, attention over pages, projection with residual, norm with gate,
up and SwiGLU, down with residual; then norm with head. Nothing is read back, so the step can be
captured in a CUDA graph: inputs, positions and the block table stay where they are.
Memory bound: every weight once for up to 16 rows, and the pages of each row.
"""

import torch
from torch import Tensor

from dar_kernels.decoder_weights import DecoderPages, DecoderWeights
from dar_kernels.linear_decode import linear_decode
from dar_kernels.linear_decode_swiglu import linear_decode_swiglu
from dar_kernels.paged_attention import paged_attention
from dar_kernels.qkv_rope_append import qkv_rope_append


def decode_step_by_ops(
    weights: DecoderWeights,
    x: Tensor,
    pages: DecoderPages,
    block_table: Tensor,
    positions: Tensor,
    implementation: str | None = "triton",
) -> Tensor:
    """Logits fp32 `[R, V]` of inputs `[R, D]`, which have the dtype of the norms.

    Products and head may be quantised; pages have that dtype too, or are int8 or float8_e4m3fn with
    scales. Appends to `pages`; a row of position -1 is idle. `block_table` int32 `[R, max_pages]`,
    `positions` integers `[R]`.
    """
    way, eps = implementation, weights.eps
    where = positions.to(torch.int32)
    lengths = where + 1
    for layer, own in zip(weights.layers, pages.by_layer(), strict=True):
        qkv = linear_decode(
            x, layer.qkv, norm_weight=layer.attention_norm, eps=eps, implementation=way
        )
        q = qkv_rope_append(
            qkv, weights.cos, weights.sin, where, own, block_table,
            heads=weights.heads, kv_heads=weights.kv_heads, implementation=way,
        )  # fmt: skip
        y = paged_attention(q, own, block_table, lengths, implementation=way).flatten(1)
        x = linear_decode(y, layer.proj, residual=x, implementation=way)
        h = linear_decode_swiglu(
            x, layer.gate, layer.up, norm_weight=layer.mlp_norm, eps=eps, implementation=way
        )
        x = linear_decode(h, layer.down, residual=x, implementation=way)
    logits = linear_decode(x, weights.head, norm_weight=weights.norm, eps=eps, implementation=way)
    return logits.float()
