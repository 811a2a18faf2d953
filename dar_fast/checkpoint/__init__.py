"""Model files: the official ones, read without executing anything in them, and our folders."""

from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.folder import load_model, save_model

__all__ = ["CheckpointError", "load_model", "save_model"]
