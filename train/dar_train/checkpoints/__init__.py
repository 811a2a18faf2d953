"""Resumable training states: safetensors and JSON only, so nothing in them can execute."""

from dar_train.checkpoints.folder import CheckpointError, find_intact
from dar_train.checkpoints.manifest import read_record
from dar_train.checkpoints.states import Checkpoints
from dar_train.checkpoints.tensors import TrainState
from dar_train.checkpoints.weights import read_weights

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "TrainState",
    "find_intact",
    "read_record",
    "read_weights",
]
