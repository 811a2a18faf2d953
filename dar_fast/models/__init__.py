"""The models of D-AR as plain modules: the reference every fast path is held to."""

from dar_fast.models.prior import Prior
from dar_fast.models.tokenizer import Tokenizer

__all__ = ["Prior", "Tokenizer"]
