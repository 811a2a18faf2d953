"""The prior: a Llama over codes. x_0 = class_embedding[y], x_{i+1} = token_embedding[z_i].

x += W_o attention(RMSNorm x); x += W_2 (silu(W_1 h) * W_3 h); logits at position p predict code p.
Decoding reads every weight once a code, for both guidance rows. Source: arXiv 2505.23660, §3.3.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dar_fast.config import PriorConfig
from dar_fast.models.decoding import start_decoding
from dar_fast.models.kv_cache import KVCache, StaticCache
from dar_fast.models.layers import Rotary, rope_angles
from dar_fast.models.prior_block import Cache, Dropout, PriorBlock, RMSNorm
from dar_fast.models.quantized import Product
from dar_fast.sampling import GuidanceScale, Sampling, Temperature, resolve_seeds
from dar_kernels import linear_cross_entropy

INIT_STD = 0.02


def line_angles(num_tokens: int, head_dim: int, base: float, device: torch.device) -> Tensor:
    """Angles `[N, Dh / 2]` of positions 0 … N - 1, in fp32 as published."""
    positions = torch.arange(num_tokens, dtype=torch.float32, device=device)
    return rope_angles(positions, head_dim, base)


class Prior(nn.Module):
    """Distribution of the codes of a picture given its class.

    Args:
        config: sizes.
        dropout: on embeddings, attention output and MLP output, while training; published: 0.1.
    """

    compiled_step: Callable[["Prior", Tensor, StaticCache], Tensor] | None = None

    def __init__(self, config: PriorConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.class_embedding = nn.Embedding(config.num_classes + 1, config.dim)
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(PriorBlock(config, dropout) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Product(config.dim, config.vocab_size)
        self.dropout = Dropout(dropout)
        self.rotary = Rotary(
            partial(line_angles, config.num_tokens, config.head_dim, config.rope_base)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
        nn.init.zeros_(self.head.weight)

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def blocks(self) -> Iterator[PriorBlock]:
        """The layers in order."""
        return (cast(PriorBlock, layer) for layer in self.layers)

    def new_cache(self, rows: int) -> KVCache:
        """An empty cache for so many rows, in the dtype of the weights."""
        return KVCache(self.config, rows, self.device, self.head.weight.dtype)

    def hidden(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normalised last hidden rows of embedded inputs `[B, n, D]`, behind a cache if given."""
        start = cache.length if cache is not None else 0
        end = start + x.shape[1]
        cos, sin = self.rotary.tables(x.device)
        normed = self._through(x, (cos[start:end], sin[start:end]), cache)
        if cache is not None:
            cache.length = end
        return normed

    def compile(self, *args: Any, **options: Any) -> None:
        """`torch.compile` this module in place, and its decode step, which drawing then goes by.

        A copy of the module is not compiled.
        """
        self.rotary.tables(self.device)  # made while tracing, they would be traced twice
        super().compile(*args, **options)
        self.compiled_step = torch.compile(Prior.step, *args, **options)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "compiled_step": None}

    def step(self, x: Tensor, cache: StaticCache) -> Tensor:
        """Logits `[R, V]` fp32 of one embedded input a row, `[R, D]`, at `cache.position`.

        No shape depends on the position: compiled, it is one graph.
        """
        cos, sin = self.rotary.tables(x.device)
        tables = cos[cache.position], sin[cache.position]
        return self.head(self._through(x[:, None], tables, cache)[:, 0]).float()

    def _through(self, x: Tensor, tables: tuple[Tensor, Tensor], cache: Cache | None) -> Tensor:
        """Normalised last hidden rows of embedded inputs `[B, n, D]`."""
        x, delta = self.dropout(x), None
        for i, layer in enumerate(self.blocks()):
            x, delta = layer(x, delta, tables, cache, i)
        return self.norm(x, delta).normed

    def embed(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Inputs `[B, 1 + n, D]`: the class, then codes `[B, n]`."""
        return torch.cat((self.class_embedding(labels)[:, None], self.token_embedding(codes)), 1)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits `[B, n, V]` fp32 of codes `[B, n]`, n ≤ N, for labels `[B]`.

        Position p is the distribution of code p given those before it; the last is not read.

        Raises:
            ValueError: where a shape or a range does not fit.
        """
        return self.head(self._rows(codes, labels)).float()

    def loss(self, codes: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy of codes `[B, n]`, n ≤ N, for labels `[B]`: a scalar; "none": `[B n]`.

        That of `forward`'s logits, which are never whole in memory; see `linear_cross_entropy`.

        Raises:
            ValueError: where a shape or a range does not fit, or `reduction` is none.
        """
        rows = self._rows(codes, labels).flatten(0, 1)
        return linear_cross_entropy(rows, self.head.weight, codes.flatten(), reduction=reduction)

    def _rows(self, codes: Tensor, labels: Tensor) -> Tensor:
        """What the head reads, `[B, n, D]`: row p knows the label and the codes before p."""
        self.check_codes(codes, 1)
        self.check_labels(labels, len(codes), null=True)
        return self.hidden(self.embed(codes[:, :-1], labels))

    def check_codes(self, codes: Tensor, least: int = 0) -> None:
        """Raise ValueError unless `codes` is `[B, n]` int64, least ≤ n ≤ N, each in [0, V)."""
        N, V = self.config.num_tokens, self.config.vocab_size
        if codes.ndim != 2 or not least <= codes.shape[1] <= N or codes.dtype != torch.int64:
            raise ValueError(
                f"codes: expected int64 [B, {least}…{N}], got {codes.dtype} {list(codes.shape)}"
            )
        if torch.compiler.is_compiling() or codes.is_cuda or not codes.numel():
            return  # a range check would read back from the device
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= V:
            raise ValueError(f"codes: expected values in [0, {V}), got {low if low < 0 else high}")

    def check_labels(self, labels: Tensor, batch: int | None = None, null: bool = False) -> None:
        """Raise ValueError unless `labels` is `[B]` int64, each a class, or null where allowed."""
        top = self.config.num_classes + null
        if labels.ndim != 1 or labels.dtype != torch.int64 or len(labels) != (batch or len(labels)):
            raise ValueError(
                f"labels: expected int64 [{batch or 'B'}], got {labels.dtype} {list(labels.shape)}"
            )
        if torch.compiler.is_compiling() or labels.is_cuda or not labels.numel():
            return
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= top:
            raise ValueError(
                f"labels: expected values in [0, {top}), got {low if low < 0 else high}"
            )

    def generate(
        self,
        labels: Tensor,
        *,
        guidance_scale: GuidanceScale = 4.0,
        temperature: Temperature = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seeds: int | Sequence[int] | Tensor | None = None,
        prefix_codes: Tensor | None = None,
    ) -> Tensor:
        """Codes `[B, N]` int64 drawn for labels `[B]`; see `Sampling` for the settings.

        `prefix_codes` `[B, P]` fixes the first P. A row depends on its own seed, label and settings
        alone.

        Raises:
            ValueError: where a setting, a shape or a range does not fit.
        """
        sampling = Sampling(
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
        )
        N = self.config.num_tokens
        return torch.cat(list(self.generation(labels, sampling, seeds, prefix_codes, N)), dim=1)

    @torch.no_grad()
    def generation(
        self,
        labels: Tensor,
        sampling: Sampling,
        seeds: int | Sequence[int] | Tensor | None = None,
        prefix_codes: Tensor | None = None,
        chunk: int = 1,
        implementation: str | None = None,
    ) -> Iterator[Tensor]:
        """Codes as they are drawn, `[B, chunk]` at a time; stop iterating to stop the work.

        `implementation` of the decode step: `triton` (CUDA), `native` (CPU) or `torch`, this
        module; None: the first that can run.

        Raises:
            ValueError: before the first chunk, where a shape or a range does not fit.
        """
        B, N, device = len(labels), self.config.num_tokens, self.device
        labels = labels.to(device)
        self.check_labels(labels)
        if N % chunk:
            raise ValueError(f"chunk: expected a divisor of {N}, got {chunk}")
        if prefix_codes is None:
            prefix_codes = labels.new_empty(B, 0)
        self.check_codes(prefix_codes)
        if len(prefix_codes) != B:
            raise ValueError(f"prefix_codes: expected [{B}, P], got {list(prefix_codes.shape)}")
        prefix = prefix_codes.to(device)
        keys = torch.tensor(resolve_seeds(seeds, B), dtype=torch.int64, device=device)
        classes = labels
        if sampling.guided(N, prefix.shape[1]):
            classes = torch.cat((labels, torch.full_like(labels, self.config.null_class)))
        run = start_decoding(self, classes, sampling, keys, prefix, implementation)
        for _ in range(0, N, chunk):
            yield run.take(chunk)
