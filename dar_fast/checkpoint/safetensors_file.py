"""Reading one safetensors file, official-named or ours: mapped, with its metadata."""

import json
import math
import os
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dar_fast.checkpoint.errors import CheckpointError

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8",
}  # fmt: skip


class SafetensorsFile(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts like one: eight bytes of length, then a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32


class TensorHeader(NamedTuple):
    dtype: str  # as torch names it
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None where torch has no such."""
        found = getattr(torch, self.dtype, None)
        return found if isinstance(found, torch.dtype) else None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def read_headers(path: str | os.PathLike[str]) -> dict[str, TensorHeader]:
    """Dtype and shape of every tensor of a file; no weights are read.

    Raises:
        CheckpointError: where it is missing, damaged or truncated.
    """
    headers = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), part.get_dtype().lower())
                headers[name] = TensorHeader(dtype, tuple(part.get_shape()))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{os.fspath(path)}: damaged or unreadable ({error})") from error
    return headers


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


def official_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """The official configuration that `convert` puts beside the weights; {} where there is none."""
    try:
        value = json.loads(metadata.get("config", "{}"))
    except (ValueError, RecursionError):
        return {}  # somebody else's metadata
    return value if isinstance(value, dict) else {}


__all__ = [
    "SafetensorsFile", "TensorHeader", "is_safetensors", "official_metadata", "read_headers",
    "read_safetensors",
]  # fmt: skip
