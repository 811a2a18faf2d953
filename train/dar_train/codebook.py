"""The codebook while it trains: use of codes, a start from the data, revival of unused codes.

Counting is one bincount of B·N codes a step; a revival encodes one batch once more.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_fast.models.tokenizer import Tokenizer
from dar_kernels import vq_nearest

KMEANS_ROUNDS = 8


@torch.no_grad()
def encoder_rows(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """l2-normalised pre-quantised rows of `images`, float32 [B·N, C]."""
    rows = tokenizer.pre_quantize(images)
    return F.normalize(rows.float().flatten(0, 1), dim=-1)


@torch.no_grad()
def start_from_rows(codebook: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    """Fit `codebook` [V, C] in place to `rows` [M, C]: some of them, then spherical k-means."""
    V, C = codebook.shape
    device = rows.device
    drawn = torch.randperm(len(rows), generator=generator, device=device)[:V]
    codebook[: len(drawn)] = rows[drawn].to(codebook.dtype)
    noise = 0.02 * torch.randn(V, C, generator=generator, device=device)
    codebook.add_(noise.to(codebook.dtype))  # no two codes may start as one
    codebook.copy_(F.normalize(codebook, dim=-1))
    for _ in range(KMEANS_ROUNDS):
        codes = vq_nearest(rows, codebook.to(rows.dtype))
        sums = torch.zeros_like(codebook).index_add_(0, codes, rows.to(codebook.dtype))
        used = torch.bincount(codes, minlength=V) > 0
        codebook[used] = F.normalize(sums[used], dim=-1)


class CodebookUse:
    """Steps since each code was last used, and use over the steps since the last report."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.idle = torch.zeros(size, dtype=torch.int32, device=device)
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)

    def count(self, codes: Tensor) -> None:
        counts = torch.bincount(codes.flatten(), minlength=len(self.idle))
        self.counts += counts
        self.idle = torch.where(counts > 0, 0, self.idle + 1)

    def report(self) -> dict[str, float]:
        """Share of codes used and perplexity of their use since the last report; starts anew."""
        figures = use_of(self.counts)
        self.counts.zero_()
        return figures

    @torch.no_grad()
    def revive(
        self,
        tokenizer: Tokenizer,
        images: Tensor,
        after: int,
        optimizers: list[torch.optim.Optimizer],
        averaged: Tensor,
        generator: torch.Generator,
    ) -> int:
        """Move codes idle for `after` steps onto encoder rows; returns how many moved.

        Their optimizer state starts at zero and their average starts at the new place.
        """
        dead = (self.idle >= after).nonzero().flatten()
        if not len(dead):
            return 0
        rows = encoder_rows(tokenizer, images)
        drawn = torch.randperm(len(rows), generator=generator, device=rows.device)[: len(dead)]
        dead = dead[: len(drawn)]
        codebook = tokenizer.quantizer.codebook
        noise = torch.randn(rows[drawn].shape, generator=generator, device=rows.device)
        codebook[dead] = F.normalize(rows[drawn] + 0.02 * noise, dim=-1).to(codebook.dtype)
        averaged[dead] = codebook[dead].to(averaged.dtype)
        for optimizer in optimizers:
            for value in optimizer.state.get(codebook, {}).values():
                if torch.is_tensor(value) and value.shape == codebook.shape:
                    value[dead] = 0
        self.idle[dead] = 0
        return len(dead)


def use_of(counts: Tensor) -> dict[str, float]:
    """Share of codes with a count, and 2 to the entropy of the counts."""
    total = int(counts.sum())
    if not total:
        return {"codes_used": 0.0, "perplexity": 0.0}
    p = counts[counts > 0].double() / total
    entropy = float(-(p * p.log()).sum())
    return {
        "codes_used": float((counts > 0).double().mean()),
        "perplexity": float(torch.tensor(entropy).exp()),
    }
