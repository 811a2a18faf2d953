"""Steps of a Llama decoder in one native call: embed a code, every layer, head, guided draw, again.

x += Wo attention(RMSNorm x); x += W2 (silu(W1 h) * W3 h); logits at position p predict code p.
Memory bound: a step reads every weight once for all rows, 2 bytes each in bf16 and 1 in int8, and
4·R·layers·Hkv·Dh bytes of bf16 pages a token before it; 2·R FLOPs a weight. C++ in
kernels/csrc/decode_step.cpp. On CUDA a step is a sequence of ops: decode_step_ops.py.
Source: REFERENCE §2; RoPE from Su et al. (2021), interleaved pairs; int8 products of activations
in two planes of bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import native
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.decoder_weights import (
    WEIGHT_DTYPES,
    DecoderPages,
    DecoderWeights,
    LayerWeights,
    Weight,
    check_on_cpu,
    readable,
)
from dar_kernels.dispatch import Op, UnavailableError
from dar_kernels.implementations import by_native, by_torch, by_triton
from dar_kernels.linear_decode import plain
from dar_kernels.pages import PAGE_SIZE
from dar_kernels.quantize import QuantizedWeight


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of `x` `[R, heads, Dh]` by `cos` and `sin` `[R, Dh / 2]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def decode_step_ref(
    weights: DecoderWeights, x: Tensor, pages: DecoderPages, block_table: Tensor, positions: Tensor
) -> Tensor:
    """One step in the dtype of its inputs, in fp64 the truth: logits `[R, V]` of inputs `[R, D]`.

    Appends to `pages`, which have no scales. `block_table` `[R, max_pages]` and `positions` `[R]`
    are integers.
    """
    if pages.key_scales is not None:
        raise TypeError(f"decode_step: expected pages without scales, got {pages.keys.dtype}")

    def product(x: Tensor, weight: Weight) -> Tensor:
        return F.linear(x, plain(weight, x.dtype))

    H, Hkv, Dh = weights.heads, weights.kv_heads, weights.head_dim
    cos, sin = weights.cos[positions].to(x.dtype), weights.sin[positions].to(x.dtype)
    page = block_table.gather(1, (positions // PAGE_SIZE)[:, None].to(torch.int64)).squeeze(1)
    longest = int(positions.max()) + 1
    rows = torch.arange(longest, device=x.device)
    mask = rows <= positions[:, None]  # [R, n]
    table = block_table[:, : -(-longest // PAGE_SIZE)].clamp_min(0)
    for layer, keys, values in zip(weights.layers, *pages[:2], strict=True):
        qkv = product(_rms_norm(x, layer.attention_norm, weights.eps), layer.qkv)
        q, k, v = qkv.unflatten(-1, (-1, Dh)).split((H, Hkv, Hkv), dim=1)  # [R, heads, Dh]
        keys[page, :, positions % PAGE_SIZE] = _rotate(k, cos, sin).to(keys.dtype)
        values[page, :, positions % PAGE_SIZE] = v.to(values.dtype)
        k, v = (
            p[table].to(x.dtype).transpose(1, 2).flatten(2, 3)[:, :, :longest]
            for p in (keys, values)
        )  # [R, Hkv, n, Dh]
        y = F.scaled_dot_product_attention(
            _rotate(q, cos, sin)[:, :, None],
            k.repeat_interleave(H // Hkv, 1),
            v.repeat_interleave(H // Hkv, 1),
            attn_mask=mask[:, None, None],
        )
        x = x + product(y.flatten(1), layer.proj)
        h = _rms_norm(x, layer.mlp_norm, weights.eps)
        x = x + product(F.silu(product(h, layer.gate)) * product(h, layer.up), layer.down)
    return product(_rms_norm(x, weights.norm, weights.eps), weights.head)


def _compiled(
    weights: DecoderWeights, x: Tensor, pages: DecoderPages, block_table: Tensor, positions: Tensor
) -> Tensor:
    """C++ on the CPU; a caller of many steps keeps the decoder and lets it `run` them."""
    return NativeDecoder(weights).logits(x, pages, block_table, positions)


OP = Op(
    name="decode_step",
    implementations=(
        by_triton(decode_step_by_ops),
        by_native(_compiled, WEIGHT_DTYPES),
        by_torch(decode_step_ref),
    ),
)


class NativeDecoder:
    """The C++ decoder over given weights, which it reads where they are.

    fp32 and bf16 products and embeddings are not copied: a change of them shows, as long as their
    memory stays. int8 products (`DecoderWeights.quantize`) are not copied either, but must not
    change. Copied once: norms and tables, and fp16 weights (to fp32). Activations are fp32 between
    the products and bf16 (at bf16 weights, where the processor multiplies bf16) or 16-bit integers
    (int8) within them.

    Args:
        weights: on the CPU, fp32, bf16 or fp16; products and head may be int8.
        isa: an instruction set of `dar_kernels.native.isa_supported()`; None: the fastest.

    Raises:
        TypeError, ValueError: where the weights do not fit together.
        UnavailableError: where the C++ ops were not built, or the weights are fp8.
    """

    def __init__(self, weights: DecoderWeights, *, isa: str | None = None) -> None:
        if not isinstance(weights, DecoderWeights):
            raise TypeError(f"decode_step: expected DecoderWeights, got {type(weights).__name__}")
        reason, stored = native.missing(), weights.quantized
        if stored not in (None, torch.int8):
            reason = f"expected int8 weights on a CPU, got {stored}; fp8 needs CUDA"
        if reason is not None:
            raise UnavailableError(f"decode_step: native: {reason}")
        from dar_kernels import _native

        self.isa = isa or ""
        self.layers, self.kv_heads = len(weights.layers), weights.kv_heads
        self.head_dim, self.dim = weights.head_dim, weights.norm.shape[-1]
        self.vocab_size = len(_values(weights.head))
        weights = weights.map(readable)
        scales = [_scales(*layer.products()) for layer in weights.layers] + [_scales(weights.head)]
        self._native = _native.Decoder(
            [_tensors(layer) for layer in weights.layers],
            scales if stored is not None else [],
            weights.norm.float(),
            _values(weights.head),
            weights.token_embedding,
            weights.cos.float(),
            weights.sin.float(),
            weights.heads,
            weights.kv_heads,
            weights.eps,
        )

    def run(
        self,
        x: Tensor,
        pages: DecoderPages,
        block_table: Tensor,
        positions: Tensor,
        *,
        steps: int,
        seeds: Tensor,
        guidance: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        uncond: Tensor | None = None,
        forced: Tensor | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """`steps` steps of B requests in one call without the interpreter's lock.

        Rows 0 … B - 1 are the conditional ones of the requests; each row behind them is the
        unconditional one of a guided request. Codes of a request are the same whatever its batch.

        Args:
            x: the first inputs, fp32 `[R, D]`, or codes to embed, int64 `[B]`, which the
                unconditional row of a request takes too.
            pages: where keys and values are appended.
            block_table: int32 `[R, max_pages]`; pages that new tokens go to belong to one row.
            positions: int64 `[B]`, of the first input; the code drawn from it has that position.
            steps: n ≥ 1.
            seeds: int64 `[B]`, of the noise.
            guidance: fp32 `[B, n]`; a step is unguided where it is ≤ 1.
            temperature: fp32 `[B]`; 0 is greedy.
            top_k: int32 `[B]`; 0 keeps all.
            top_p: fp32 `[B]` in (0, 1].
            uncond: int64 `[B]`, the unconditional row of each request, in [B, R), no two alike;
                -1 where it is unguided. R is B and the number of guided requests. None: unguided.
            forced: int64 `[B, n]`, codes that are given, -1 where one is to be drawn; a step with
                all codes given skips the head.
            threads: None: torch.get_num_threads().

        Returns:
            codes, int64 `[B, n]`.

        Raises:
            TypeError: where a dtype does not fit.
            ValueError: where a shape, a range or a stride does not fit.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"decode_step: expected integer steps >= 1, got {steps!r}")
        tensors = {
            "x": x, "block_table": block_table, "positions": positions, "seeds": seeds,
            "guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        }  # fmt: skip
        given = {k: t for k, t in (("uncond", uncond), ("forced", forced)) if t is not None}
        check_on_cpu(tensors | given, pages)
        codes = torch.empty(len(positions), steps, dtype=torch.int64)
        self._native.run(
            x.detach(), pages.keys, pages.values, block_table, positions, seeds, guidance,
            temperature, top_k, top_p, forced, codes, uncond, _threads(threads), self.isa,
        )  # fmt: skip
        return codes

    def logits(
        self,
        x: Tensor,
        pages: DecoderPages,
        block_table: Tensor,
        positions: Tensor,
        *,
        threads: int | None = None,
    ) -> Tensor:
        """Logits fp32 `[R, V]` of one step of R rows, of which nothing is drawn; see `run`.

        Args:
            x: fp32 `[R, D]`, or codes to embed, int64 `[R]`.
            pages: where keys and values are appended.
            block_table: int32 `[R, max_pages]`.
            positions: int64 `[R]`.
            threads: None: torch.get_num_threads().

        Raises:
            TypeError: where a dtype does not fit.
            ValueError: where a shape, a range or a stride does not fit.
        """
        check_on_cpu({"x": x, "block_table": block_table, "positions": positions}, pages)
        out = torch.empty(len(positions), self.vocab_size)
        self._native.logits(
            x.detach(), pages.keys, pages.values, block_table, positions, out, _threads(threads),
            self.isa,
        )  # fmt: skip
        return out


def _values(weight: Weight) -> Tensor:
    return weight.values if isinstance(weight, QuantizedWeight) else weight


def _tensors(layer: LayerWeights) -> list[Tensor]:
    attention, mlp = layer.products()[:2], layer.products()[2:]
    norms = layer.attention_norm.float(), layer.mlp_norm.float()
    return [norms[0], *map(_values, attention), norms[1], *map(_values, mlp)]


def _scales(*weights: Weight) -> list[Tensor]:
    return [weight.scale for weight in weights if isinstance(weight, QuantizedWeight)]


def _threads(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads
