"""What single codes cost: the figure that a prior has to beat."""

import torch
from torch import Tensor


def unigram(train: Tensor, held_out: Tensor, vocab_size: int) -> dict[str, float]:
    """Entropy of single training codes, and the held-out codes' cross-entropy under them, in nats.

    The cross-entropy adds one to every count, so that unseen codes cost a finite amount.
    """
    counts = torch.bincount(train.flatten().long(), minlength=vocab_size).double()
    p = counts[counts > 0] / counts.sum()
    smooth = ((counts + 1) / (counts.sum() + vocab_size)).log()
    return {
        "unigram_entropy": float(-(p * p.log()).sum()),
        "unigram_cross_entropy": float(-smooth[held_out.flatten().long()].mean()),
    }
