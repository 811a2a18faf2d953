"""The codebook while it trains: use of codes, a start from the data, revival of unused codes.

Counting is two passes over B·N codes a step; a revival encodes one batch once more. What changes
the codebook is computed alike on every rank: from the first rank's pictures, and counts of all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from dar_fast.models.tokenizer import Tokenizer
from dar_kernels import vq_nearest
from dar_train.parallel import Parallel
from dar_train.shards import assign, whole

KMEANS_ROUNDS = 8
JITTER = 0.02  # a channel: no two codes may start as one


@torch.no_grad()
def encoder_rows(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    """l2-normalised pre-quantised rows of `images`, float32 [B·N, C]."""
    rows = tokenizer.pre_quantize(images)
    return F.normalize(rows.float().flatten(0, 1), dim=-1)


@torch.no_grad()
def start_from_rows(codebook: Tensor, rows: Tensor, generator: torch.Generator) -> None:
    """Fit `codebook` [V, C] in place to `rows` [M, C]: some of them, then spherical k-means.

    `generator` is the host's.
    """
    V = len(codebook)
    drawn = torch.randperm(len(rows), generator=generator)[:V].to(rows.device)
    codebook[: len(drawn)] = rows[drawn].to(codebook.dtype)
    codebook.copy_(_jittered(codebook, generator))
    for _ in range(KMEANS_ROUNDS):
        codes = vq_nearest(rows, codebook.to(rows.dtype))
        sums = torch.zeros_like(codebook).index_add_(0, codes, rows.to(codebook.dtype))
        used = torch.bincount(codes, minlength=V) > 0
        codebook[used] = F.normalize(sums[used], dim=-1)


def _jittered(rows: Tensor, generator: torch.Generator) -> Tensor:
    noise = JITTER * torch.randn(rows.shape, generator=generator)
    return F.normalize(rows + noise.to(rows), dim=-1)


def of_first_rank(parallel: Parallel, value: Tensor) -> Tensor:
    """The first rank's `value`, on every rank; they call it with tensors of one shape."""
    return parallel.sum(value if parallel.ranks.first else torch.zeros_like(value))


class CodebookUse:
    """How often each code was used by this rank: since the last report, and since the last revival.

    On the device until they are read.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.recent = torch.zeros(size, dtype=torch.int64, device=device)

    def count(self, codes: Tensor, used: Tensor) -> None:
        """Count `codes` int64 where `used` bool, of one shape."""
        for counts in (self.counts, self.recent):  # bincount would read the largest on the host
            counts.scatter_add_(0, codes.flatten(), used.flatten().long())

    def report(self, parallel: Parallel) -> dict[str, float]:
        """Use over all ranks since the last report; starts anew. Every rank calls it."""
        counts = parallel.sum(self.counts)
        figures = {**use_of(counts), "codes_dead": float((counts == 0).sum())}
        self.counts.zero_()
        return figures

    @torch.no_grad()
    def revive(
        self,
        parallel: Parallel,
        codebooks: Sequence[Tensor],
        rows: Tensor,
        optimizers: Sequence[Optimizer],
        generator: torch.Generator,
    ) -> int:
        """Move codes that no rank used since the last call onto encoder rows; returns how many.

        Every rank calls it.

        Args:
            codebooks: `[V, C]` each, the model's, maybe a shard of it, and averages of it.
            rows: `[M, C]`, l2-normalised, as many on every rank; the first rank's are taken.
            optimizers: their state of the moved codes starts at zero.
            generator: the host's, in one state on all ranks.
        """
        dead = (parallel.sum(self.recent) == 0).nonzero().flatten()
        self.recent.zero_()
        rows = of_first_rank(parallel, rows)
        drawn = torch.randperm(len(rows), generator=generator)[: len(dead)].to(rows.device)
        if not len(dead):
            return 0
        dead = dead[: len(drawn)]
        moved = _jittered(rows[drawn], generator)
        for codebook in codebooks:
            full = whole(codebook).clone()
            full[dead] = moved.to(full.dtype)
            assign(codebook, full)
        for optimizer in optimizers:
            for value in optimizer.state.get(codebooks[0], {}).values():
                if torch.is_tensor(value) and value.shape == codebooks[0].shape:
                    full = whole(value).clone()
                    full[dead] = 0
                    assign(value, full)
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
