"""What ops say of an argument that does not fit: what was expected, and what came.

Before any launch, in the order type, dtype, shape, device. Nothing is read back from a GPU, and
sizes are only compared, so that torch.compile traces these checks with dynamic shapes too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.triton_support import TRITON_DTYPES

FLOATS = (*TRITON_DTYPES, torch.float64)
_UNREAD: ContextVar[bool] = ContextVar("values are not checked", default=False)


class Dim(NamedTuple):
    """A dimension with bounds, both included."""

    name: str
    least: int = 1
    most: int | None = None

    def __str__(self) -> str:
        if self.most is None:
            return f"{self.name} >= {self.least}"
        return f"{self.least} <= {self.name} <= {self.most}"


# An int: this size. A name: any size. An ellipsis, first: any leading dimensions.
Shape = Sequence[int | str | Dim | EllipsisType]


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Shape,
    dtypes: Sequence[torch.dtype] | None = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise unless `value` is a tensor of this shape, in one of these dtypes, on this device.

    None: any dtype, or any device.

    Raises:
        TypeError: where it is no tensor, or of another dtype.
        ValueError: where its shape or device differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: expected {name} a tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        names = ", ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        names = f"one of {names}" if "," in names else names
        raise TypeError(f"{op}: expected {name} in {names}, got {value.dtype}")
    if not _fits(value.shape, shape):
        wanted = ", ".join("..." if size is ... else str(size) for size in shape)
        raise ValueError(f"{op}: expected {name} [{wanted}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {value.device}")


def _fits(sizes: Sequence[int], shape: Shape) -> bool:
    if len(shape) > 0 and shape[0] is ...:
        shape = shape[1:]
        sizes = sizes[max(0, len(sizes) - len(shape)) :]
    if len(sizes) != len(shape):
        return False
    for size, wanted in zip(sizes, shape, strict=True):
        if isinstance(wanted, str):
            continue
        if isinstance(wanted, Dim):
            if size < wanted.least or (wanted.most is not None and size > wanted.most):
                return False
        elif size != wanted:
            return False
    return True


def dtypes_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes of the tensors that go with `x`: its own, or under autocast all that it casts."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return TRITON_DTYPES
    return (x.dtype,)


def lowered(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of autocast where it is on, but fp64 and else as they are."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def check_alike(op: str, x: Tensor, shape: Shape, **others: Tensor) -> None:
    """Raise unless `x` is of this shape, and the others of its sizes, on its device, in its dtype.

    Raises:
        TypeError: where one is no tensor, or of a dtype not among `dtypes_beside(x)`.
        ValueError: where a shape or device differs.
    """
    check_tensor(op, "x", x, shape)
    dtypes = dtypes_beside(x)
    for name, tensor in others.items():
        check_tensor(op, name, tensor, x.shape, dtypes, x.device)


def check_norm(op: str, x: Tensor, most: int, eps: float, **affine: Tensor | None) -> None:
    """Raise unless `x` is `[..., D]` with D ≤ `most`, each of `affine` `[D]` as `x` or fp32.

    Raises:
        TypeError: where one is no tensor, or its dtype does not fit.
        ValueError: where a shape or device does not fit, or eps is not positive.
    """
    check_tensor(op, "x", x, (..., Dim("D", 1, most)))
    if not eps > 0:
        raise ValueError(f"{op}: expected eps > 0, got {eps}")
    for name, tensor in affine.items():
        if tensor is not None:
            check_tensor(op, name, tensor, x.shape[-1:], (x.dtype, torch.float32), x.device)


@contextmanager
def values_unread() -> Iterator[None]:
    """Within it, values are not checked on the CPU either: for work that is recorded."""
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def readable(tensor: Tensor) -> bool:
    """Whether values can be checked: on the CPU, and not while work is traced or recorded."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not _UNREAD.get()


def check_below(op: str, name: str, values: Tensor, end: int, where: Tensor | None = None) -> None:
    """Raise unless all integers are in [0, end), those with `where` set; only where `readable`.

    Raises:
        ValueError: for the first that is not.
    """
    if not readable(values):
        return
    wrong = (values < 0) | (values >= end)
    wrong = wrong if where is None else wrong & where
    if wrong.any():
        raise ValueError(f"{op}: expected {name} in [0, {end}), got {int(values[wrong][0])}")
