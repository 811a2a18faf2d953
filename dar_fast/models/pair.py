"""A prior and a tokenizer that belong together."""

from dar_fast.models.prior import Prior
from dar_fast.models.tokenizer import Tokenizer


def check_pair(prior: Prior, tokenizer: Tokenizer) -> None:
    """Raise unless the codes that one draws are those that the other reads, on one device.

    Raises:
        TypeError: where one is no such module.
        ValueError: where they do not fit each other.
    """
    if not isinstance(prior, Prior):
        raise TypeError(f"prior: expected a Prior, got {type(prior).__name__}")
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer: expected a Tokenizer, got {type(tokenizer).__name__}")
    if prior.device != tokenizer.device:
        raise ValueError(
            f"tokenizer: expected the prior's device {prior.device}, got {tokenizer.device}"
        )
    drawn = prior.config.num_tokens, prior.config.vocab_size
    read = tokenizer.config.num_tokens, tokenizer.config.codebook_size
    if drawn != read:
        raise ValueError(
            f"prior: expected the tokenizer's {read[0]} tokens of {read[1]} codes, "
            f"got {drawn[0]} of {drawn[1]}"
        )


__all__ = ["check_pair"]
