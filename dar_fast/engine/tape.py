"""Operations of a function, taken down as a CUDA graph takes them down, to be done again.

A replay calls every operation on the very same tensors and copies what it returns into the very
same results; Python does not run again, views stay views, and an op of this library is one entry.
What a CUDA graph cannot hold is refused: reading a value back, shapes that depend on values, copies
between devices, tensors made of host values.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dar_kernels.checks import values_unread

T = TypeVar("T")
_EMPTY = ("aten::empty", "aten::new_empty")  # and empty_like, empty_strided, …: no kernel
_MASKED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_COPIES = ("aten::copy_", "aten::_to_copy")
_READS = (Tensor.tolist, Tensor.numpy)  # on the CPU they read memory without an operation


class HostReadError(RuntimeError):
    """Work to be captured did what a CUDA graph cannot hold; the message names the operation."""


class Entry(NamedTuple):
    """One operation as it was called, and its results."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_view(op: torch._ops.OpOverload) -> bool:
    """Whether the result is part of an argument, which is not written."""
    aliases = [r.alias_info for r in op._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _why_not(
    op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """What keeps an operation out of a CUDA graph, or None."""
    name = op._schema.name
    if name == "aten::lift_fresh":
        return "makes a tensor of host values"
    if name in _MASKED:
        indices: Sequence[Tensor | None] = args[1]
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return "reads a mask back to know how many elements it picks"
        return None
    if torch.Tag.data_dependent_output in op.tags:
        return "reads a value back"
    if torch.Tag.dynamic_output_shape in op.tags:
        return "reads values back to know the shape of its result"
    if name in _COPIES:
        places = {t.device.type for t in _tensors(args)}
        if (device := kwargs.get("device")) is not None:
            places.add(torch.device(device).type)
        if len(places) > 1:
            return f"copies between {' and '.join(sorted(places))}"
    return None


class Tape:
    """Entries in order."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self.launches = 0  # entries that a GPU would run a kernel for

    def add(self, entry: Entry) -> None:
        """Append one, unless it is a view or an empty tensor, which need no replay."""
        schema = entry.op._schema
        if _is_view(entry.op) or schema.name.startswith(_EMPTY):
            return
        if not schema.is_mutable and not any(True for _ in _tensors(entry.result)):
            return  # the device of a tensor, or the like
        self.launches += 1
        self._entries.append(entry)

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again, on the same tensors."""
        for op, args, kwargs, result in self._entries:
            again = op(*args, **kwargs)
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                if old is not new:
                    old.copy_(new)


class _Reads(TorchFunctionMode):
    """Refuses reads that are no operation."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READS:
            raise HostReadError(f"capture: {func.__name__} reads values back")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of its base
    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tape = tape

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if (reason := _why_not(func, args, kwargs)) is not None:
            raise HostReadError(f"capture: {func} {reason}")
        result = func(*args, **kwargs)
        self.tape.add(Entry(func, args, kwargs, result))
        return result


def record(fn: Callable[[], T]) -> tuple[Tape, T]:
    """Run `fn` once; what it did, and what it returned.

    Values are not checked on the way, as they would not be on a GPU.

    Raises:
        HostReadError: where it does what a CUDA graph cannot hold.
    """
    tape = Tape()
    with torch.no_grad(), values_unread(), _Reads(), _Recorder(tape):
        outputs = fn()
    return tape, outputs


__all__ = ["HostReadError", "Tape", "record"]
