"""Built-in scorers of candidates: what `BestOf.scorer` may name.

class_score: log p(codes | class) - log p(codes), the classifier that guidance follows, from the
prior itself: one pass over n sequences of g Q codes, for both classes.
detail: mean absolute difference of neighbouring pixels of the preview.
"""

import torch
from torch import Tensor

from dar_fast.engine.request import Candidates, Scorer
from dar_fast.models import Prior


def detail(candidates: Candidates) -> Tensor:
    """`[n]`, higher for pictures with more edges."""
    pictures = candidates.previews
    across = pictures.diff(dim=3).abs().mean((1, 2, 3))
    return across + pictures.diff(dim=2).abs().mean((1, 2, 3))


def class_score(prior: Prior) -> Scorer:
    """The scorer that asks `prior` how much better the codes fit their class than any."""

    @torch.no_grad()
    def score(candidates: Candidates) -> Tensor:
        codes = candidates.codes.to(prior.device)
        n = len(codes)
        labels = torch.full((n,), candidates.label, device=prior.device)
        null = torch.full_like(labels, prior.config.null_class)
        losses = [
            prior.loss(codes, classes, reduction="none").view(n, -1).double().sum(1)
            for classes in (labels, null)
        ]
        return (losses[1] - losses[0]).cpu()

    return score


def scorers(prior: Prior) -> dict[str, Scorer]:
    """By name."""
    return {"class_score": class_score(prior), "detail": detail}


SCORERS = ("class_score", "detail")

__all__ = ["SCORERS", "class_score", "detail", "scorers"]
