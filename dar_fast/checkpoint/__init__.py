"""Model files: the official ones, read without executing anything in them, and our folders."""

from dar_fast.checkpoint.convert import convert
from dar_fast.checkpoint.describe import describe
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.folder import load_model, save_model
from dar_fast.checkpoint.official import load_official_prior, load_official_tokenizer, to_official

__all__ = [
    "CheckpointError",
    "convert",
    "describe",
    "load_model",
    "load_official_prior",
    "load_official_tokenizer",
    "save_model",
    "to_official",
]
