"""Reading one safetensors file, official-named or ours: mapped, with its metadata."""

import os
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dar_fast.checkpoint.errors import CheckpointError


class SafetensorsFile(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts like one: eight bytes of length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """All tensors of a file, on the CPU.

    Raises:
        CheckpointError: where it is missing, damaged or truncated.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return SafetensorsFile(tensors, file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)}: damaged or unreadable ({error})") from error


__all__ = ["SafetensorsFile", "is_safetensors", "read_safetensors"]
