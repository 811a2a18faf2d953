"""Tensors of a `.pt` file as checked views over its mapping: nothing is read until used."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dar_fast.checkpoint.archive import Archive
from dar_fast.checkpoint.errors import CheckpointError, Limits
from dar_fast.checkpoint.records import Name

DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
        "bool", "uint16", "uint32", "uint64", "complex64", "complex128",
        "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
}  # fmt: skip
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_KEY_DIGITS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """One member data/N: all of its bytes, and the type that the pickle gave it (None: untyped)."""

    data: Tensor  # uint8
    dtype: torch.dtype | None


class Storages:
    """Opens storages by their persistent id and cuts tensors out of them.

    Args:
        archive: the file; every storage must be one of its members, in full.
    """

    def __init__(self, archive: Archive, limits: Limits) -> None:
        self.archive = archive
        self.limits = limits
        self._bytes: dict[str, Tensor] = {}

    def open(self, persistent_id: object) -> Storage:
        """The storage of ("storage", storage class, key, location, elements)."""
        if not isinstance(persistent_id, tuple) or len(persistent_id) != 5:
            raise CheckpointError(f"refused persistent id of type {type(persistent_id).__name__}")
        kind, cls, key, location, count = persistent_id
        if kind != "storage" or not isinstance(cls, Name) or not isinstance(location, str):
            raise CheckpointError("refused persistent id: expected a storage")
        if cls.module == "torch" and cls.name in STORAGES:
            dtype = STORAGES[cls.name]
        elif (cls.module, cls.name) == ("torch.storage", "UntypedStorage"):
            dtype = None
        else:
            raise CheckpointError(f"refused storage class {cls}")
        if (
            not isinstance(key, str)
            or not (key.isascii() and key.isdigit())
            or len(key) > _KEY_DIGITS
        ):
            raise CheckpointError(f"refused storage key {str(key)[:64]!r}: expected a number")
        member = self.archive.members.get(f"data/{key}")
        if member is None:
            raise CheckpointError(f"missing: storage data/{key} is not in the archive")
        itemsize = dtype.itemsize if dtype is not None else 1
        if type(count) is not int or count * itemsize != member.size:
            raise CheckpointError(
                f"storage data/{key}: declared {str(count)[:32]} elements of {itemsize} bytes, "
                f"got {member.size} bytes"
            )
        if key not in self._bytes:
            self._bytes[key] = self._map(member.start, member.size)
        return Storage(self._bytes[key], dtype)

    def _map(self, start: int, size: int) -> Tensor:
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        data = torch.frombuffer(self.archive.mapping, dtype=torch.uint8, count=size, offset=start)
        return data if start % 16 == 0 else data.clone()  # torch aligns to 64; others are copied

    def view(
        self,
        storage: object,
        offset: object,
        size: object,
        stride: object,
        dtype: torch.dtype | None,
    ) -> Tensor:
        """The tensor of these sizes and strides, counted in elements, if it lies in its storage."""
        if not isinstance(storage, Storage):
            raise CheckpointError(f"expected a storage to view, got {type(storage).__name__}")
        dtype = dtype or storage.dtype
        if dtype is None:
            raise CheckpointError("untyped storage without a dtype")
        sizes, strides = self._integers(size, "size"), self._integers(stride, "stride")
        (start,) = self._integers((offset,), "offset")
        if len(sizes) != len(strides):
            raise CheckpointError(f"tensor of {len(sizes)} sizes and {len(strides)} strides")
        count, elements = math.prod(sizes), storage.data.numel() // dtype.itemsize
        if count == 0:
            return torch.empty(sizes, dtype=dtype)
        last = start + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        if last >= elements or count > elements:
            raise CheckpointError(
                f"tensor {sizes} with strides {strides} from {start} reaches outside its storage "
                f"of {elements} elements"
            )
        return (
            storage.data[: elements * dtype.itemsize].view(dtype).as_strided(sizes, strides, start)
        )

    def _integers(self, values: object, what: str) -> tuple[int, ...]:
        if not isinstance(values, tuple) or len(values) > self.limits.dimensions:
            raise CheckpointError(
                f"tensor {what}: expected a tuple of <= {self.limits.dimensions} numbers"
            )
        if not all(type(v) is int and 0 <= v < 1 << 48 for v in values):
            raise CheckpointError(f"tensor {what}: expected integers >= 0, got {str(values)[:100]}")
        return values


def is_tensor_class(value: Any) -> bool:
    return isinstance(value, Name) and str(value) in (
        "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    )  # fmt: skip


__all__ = ["DTYPES", "STORAGES", "Storage", "Storages", "is_tensor_class"]
