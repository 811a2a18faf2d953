"""Drawing the codes of a batch: through the module (plain, compiled), by fused ops, or in C++.

All read every weight once a code for all rows; a guided request has two rows. Fused ops (Triton)
are six launches a layer over keys and values in pages of 32 tokens. On a CPU one native call draws
many codes, where the module takes 300 operator calls each.
"""

from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dar_fast.models.kv_cache import StaticCache
from dar_fast.sampling import Sampling
from dar_kernels import guided_sample
from dar_kernels.decode_step import OP, NativeDecoder
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.decoder_weights import (
    DecoderPages,
    DecoderWeights,
    LayerWeights,
    new_decoder_pages,
)
from dar_kernels.pages import PAGE_SIZE

if TYPE_CHECKING:
    from dar_fast.models.prior import Prior
    from dar_fast.models.prior_block import PriorBlock

MOST_K, LEAST_P = 2**31 - 1, 1e-37  # that int32 and fp32 hold, as `guided_sample` takes them


def filter_settings(top_k: int, top_p: float) -> tuple[int, float]:
    """Settings of `Sampling` as draws take them: a vast top_k keeps all, a tiny top_p one code."""
    return min(top_k, MOST_K), max(top_p, LEAST_P)


def decoder_weights(prior: "Prior") -> DecoderWeights:
    """The parameters of a prior, uncopied, as `dar_kernels.decode_step` reads them."""

    def layer(block: "PriorBlock") -> LayerWeights:
        attention, mlp = block.attention, block.mlp
        return LayerWeights(
            block.attention_norm.weight, attention.qkv.weight, attention.proj.weight,
            block.mlp_norm.weight, mlp.gate.weight, mlp.up.weight, mlp.down.weight,
        )  # fmt: skip

    config = prior.config
    return DecoderWeights(
        [layer(block) for block in prior.blocks()], prior.norm.weight, prior.head.weight,
        prior.token_embedding.weight, *prior.rotary.tables(prior.device),
        config.heads, config.key_value_heads, config.norm_eps,
    )  # fmt: skip


def room(weights: DecoderWeights, rows: int, dtype: torch.dtype) -> tuple[DecoderPages, Tensor]:
    """Pages for every position of so many rows, and the block table int32 `[R, pages]`."""
    each = -(-len(weights.cos) // PAGE_SIZE)
    pages = new_decoder_pages(weights, rows * each, dtype)
    table = torch.arange(rows * each, dtype=torch.int32, device=pages.keys.device)
    return pages, table.view(rows, each)


class Decoding:
    """One run over the positions of B requests; `take` draws the next codes.

    Args:
        prior: the model.
        classes: `[R]` int64, R = B, or 2 B with the null class in the second half: guided.
        sampling: how codes are drawn.
        seeds: `[B]` int64.
        prefix: `[B, P]` int64, the first codes, given.
    """

    def __init__(
        self, prior: "Prior", classes: Tensor, sampling: Sampling, seeds: Tensor, prefix: Tensor
    ) -> None:
        self.prior, self.sampling, self.seeds, self.prefix = prior, sampling, seeds, prefix
        self.guided = len(classes) > len(seeds)
        self.position = 0
        self.scales = sampling.scales(prior.config.num_tokens)
        self.temperatures = sampling.temperatures(prior.config.num_tokens)
        self._start(classes)

    def _rows(self, codes: Tensor) -> Tensor:
        """Both guidance rows of a request take its codes."""
        return torch.cat((codes, codes)) if self.guided else codes

    def _draw(self, logits: Tensor, position: int) -> Tensor:
        """Codes `[B]` of one position from the logits `[R, V]` of all rows."""
        cond, uncond = logits.chunk(2) if self.guided else (logits, None)
        top_k, top_p = filter_settings(self.sampling.top_k, self.sampling.top_p)
        return guided_sample(
            cond, uncond, self.seeds, torch.full_like(self.seeds, position),
            guidance_scale=float(self.scales[position]),
            temperature=float(self.temperatures[position]),
            top_k=top_k, top_p=top_p,
        )  # fmt: skip

    def _start(self, classes: Tensor) -> None:
        raise NotImplementedError

    def take(self, count: int) -> Tensor:
        """The next `count` codes, int64 `[B, count]`."""
        raise NotImplementedError


class PlainDecoding(Decoding):
    """Through the module, with its cache."""

    def _start(self, classes: Tensor) -> None:
        self.cache = self.prior.new_cache(len(classes))
        self.inputs = self.prior.embed(self._rows(self.prefix), classes)  # [R, 1 + P, D]

    def take(self, count: int) -> Tensor:
        first, self.position = self.position, self.position + count
        codes = [self.prefix[:, i] for i in range(first, min(self.position, self.prefix.shape[1]))]
        for p in range(first + len(codes), self.position):
            hidden = self.prior.hidden(self.inputs, self.cache)[:, -1]
            code = self._draw(self.prior.head(hidden).float(), p)
            self.inputs = self.prior.token_embedding(self._rows(code))[:, None]
            codes.append(code)
        return torch.stack(codes, dim=1)


class SteppedDecoding(Decoding):
    """One code at a time; a prefix goes the same way."""

    inputs: Tensor  # [R, D]

    def _logits(self) -> Tensor:
        """Logits `[R, V]` of `inputs`, which are appended."""
        raise NotImplementedError

    def take(self, count: int) -> Tensor:
        codes, P = [], self.prefix.shape[1]
        for p in range(self.position, self.position + count):
            logits = self._logits()
            code = self.prefix[:, p] if p < P else self._draw(logits, p)
            self.inputs = self.prior.token_embedding(self._rows(code))
            codes.append(code)
        self.position += count
        return torch.stack(codes, dim=1)


class CompiledDecoding(SteppedDecoding):
    """By the step that `Prior.compile` compiled."""

    def _start(self, classes: Tensor) -> None:
        prior = self.prior
        self.cache = StaticCache(prior.config, len(classes), prior.device, prior.head.weight.dtype)
        self.inputs = prior.class_embedding(classes)

    def _logits(self) -> Tensor:
        step = self.prior.compiled_step or type(self.prior).step
        logits: Tensor = step(self.prior, self.inputs, self.cache)
        self.cache.position += 1
        return logits


class PagedDecoding(SteppedDecoding):
    """By the fused ops of `decode_step`."""

    def _start(self, classes: Tensor) -> None:
        self.weights = decoder_weights(self.prior)
        rows, device = len(classes), classes.device
        self.pages, self.block_table = room(self.weights, rows, self.prior.head.weight.dtype)
        self.inputs = self.prior.class_embedding(classes)  # [R, D]
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)

    def _logits(self) -> Tensor:
        logits = decode_step_by_ops(
            self.weights, self.inputs, self.pages, self.block_table, self.positions
        )
        self.positions += 1
        return logits


class NativeDecoding(Decoding):
    """One call into C++ for all the codes asked for; no dropout, whatever the module's mode.

    `decoder`: one over the weights of `prior`, quantised or kept from an earlier run.
    """

    def __init__(
        self,
        prior: "Prior",
        classes: Tensor,
        sampling: Sampling,
        seeds: Tensor,
        prefix: Tensor,
        decoder: NativeDecoder | None = None,
    ) -> None:
        self._given = decoder
        super().__init__(prior, classes, sampling, seeds, prefix)

    def _start(self, classes: Tensor) -> None:
        weights = decoder_weights(self.prior)
        self.decoder = self._given or NativeDecoder(weights)
        dtype = torch.float32 if self.prior.head.weight.dtype == torch.float32 else torch.bfloat16
        self.pages, self.block_table = room(weights, len(classes), dtype)
        self.inputs = self.prior.class_embedding(classes).float()  # [R, D], then codes [B]
        B = len(self.seeds)
        self.uncond = torch.arange(B, 2 * B) if self.guided else None

    def take(self, count: int) -> Tensor:
        warmth = self.temperatures[self.position : self.position + count]
        runs = [len(list(run)) for _, run in groupby(warmth.tolist())]  # a call has one temperature
        return torch.cat([self._run(length) for length in runs], dim=1)

    def _run(self, count: int) -> Tensor:
        """The next `count` codes, which have one temperature."""
        B, sampling, first = len(self.seeds), self.sampling, self.position
        given = self.prefix[:, first : first + count]
        top_k, top_p = filter_settings(sampling.top_k, sampling.top_p)
        forced = torch.nn.functional.pad(given, (0, count - given.shape[1]), value=-1)
        codes = self.decoder.run(
            self.inputs, self.pages, self.block_table,
            torch.full((B,), first), steps=count, seeds=self.seeds,
            guidance=self.scales[first : first + count].expand(B, -1).contiguous(),
            temperature=self.temperatures[first].expand(B).contiguous(),
            top_k=torch.full((B,), top_k, dtype=torch.int32), top_p=torch.full((B,), top_p),
            uncond=self.uncond, forced=forced.contiguous() if given.shape[1] else None,
        )  # fmt: skip
        self.position += count
        self.inputs = codes[:, -1].contiguous()
        return codes


KINDS: dict[str, type[Decoding]] = {
    "triton": PagedDecoding,
    "native": NativeDecoding,
    "torch": PlainDecoding,
}


def start_decoding(
    prior: "Prior",
    classes: Tensor,
    sampling: Sampling,
    seeds: Tensor,
    prefix: Tensor,
    implementation: str | None = None,
) -> Decoding:
    """A run as `Decoding` describes, by the implementation of `decode_step` that is chosen.

    A compiled prior decodes by its step, unless another implementation than `torch` is named.
    """
    if prior.compiled_step is not None and implementation in (None, "torch"):
        return CompiledDecoding(prior, classes, sampling, seeds, prefix)
    chosen = OP.pick(prior.device.type, prior.head.weight.dtype, implementation)
    return KINDS[chosen](prior, classes, sampling, seeds, prefix)
