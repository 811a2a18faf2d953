"""Data sets as codes: `dar tokenize` writes a folder once, training the prior reads it."""

from dar_train.tokens.batches import CodeBatch, CodeBatches, code_batches
from dar_train.tokens.encode import Progress, load_tokenizer, spec_of, write_tokens
from dar_train.tokens.manifest import Spec, View, folder_hash, read_manifest, views_of
from dar_train.tokens.store import Store, check_belongs, open_store
from dar_train.tokens.unigram import unigram
from dar_train.tokens.writer import await_complete

__all__ = [
    "CodeBatch", "CodeBatches", "Progress", "Spec", "Store", "View", "await_complete",
    "check_belongs", "code_batches", "folder_hash", "load_tokenizer", "open_store",
    "read_manifest", "spec_of", "unigram", "views_of", "write_tokens",
]  # fmt: skip
