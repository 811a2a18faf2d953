"""A pickle machine that builds tensors, containers, plain values and records, and nothing else.

It interprets the binary opcodes of protocols 2 to 5 itself (Lib/pickletools.py has their meaning):
no import, no attribute access and no call of anything that the pickle names; names go to
`Constructors`. Text opcodes of protocol 0, INST, OBJ, the extension registry and out-of-band
buffers are refused: torch.save writes none. About 0.3 µs an opcode.
"""

import pickle
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from dar_fast.checkpoint.constructors import Constructors, checked_key
from dar_fast.checkpoint.errors import CheckpointError, Limits
from dar_fast.checkpoint.records import Name, Record
from dar_fast.checkpoint.storages import Storages

_OPCODE_NAMES = {ord(op.code): op.name for op in pickletools.opcodes}
_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")


class Machine:
    """One run over one pickle.

    Args:
        data: the whole pickle.
        storages: where persistent ids lead.
        limits: bounds on everything a pickle can make grow.
    """

    def __init__(self, data: bytes, storages: Storages, limits: Limits) -> None:
        if len(data) > limits.pickle_bytes:
            raise CheckpointError(f"pickle of {len(data)} bytes, expected <= {limits.pickle_bytes}")
        self.data = data
        self.at = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open MARK
        self.memo: dict[int, Any] = {}
        self.storages = storages
        self.limits = limits
        self.constructors = Constructors(storages, limits)

    def run(self) -> Any:
        """The object that the pickle describes.

        Raises:
            CheckpointError: naming what was refused, or where the pickle is damaged.
        """
        data, end, actions = self.data, len(self.data), _ACTIONS
        for _ in range(self.limits.opcodes):
            at = self.at
            if at >= end:
                raise CheckpointError("truncated: the pickle has no end")
            code = data[at]
            self.at = at + 1
            if code == _STOP:
                if len(self.stack) != 1 or self.marks:
                    raise CheckpointError("damaged: the pickle ends with an unfinished object")
                return self.stack.pop()
            action = actions.get(code)
            if action is None:
                raise CheckpointError(self._refusal(code, at))
            try:
                action(self)
            except IndexError:
                raise CheckpointError(
                    f"damaged: {_name(code)} at {at} finds nothing to use"
                ) from None
            except (struct.error, UnicodeDecodeError) as error:
                raise CheckpointError(f"damaged: {_name(code)} at {at}: {error}") from None
        raise CheckpointError(f"pickle of more than {self.limits.opcodes} opcodes")

    def _refusal(self, code: int, at: int) -> str:
        if code == pickle.INST[0]:
            lines = self.data[at + 1 : at + 512].split(b"\n")[:2]
            named = ".".join(line.decode("ascii", "replace") for line in lines)
            return f"refused opcode INST of {named}"
        if code == pickle.OBJ[0]:
            return f"refused opcode OBJ of {next(iter(self.stack), 'nothing')!s:.100}"
        return f"refused opcode {_name(code)} at byte {at}: torch.save does not write it"

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise CheckpointError(f"truncated: {count} bytes wanted, {len(self.data) - start} left")
        return self.data[start : self.at]

    def number(self, layout: struct.Struct) -> Any:
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def string(self, count: int) -> bytes:
        if count > self.limits.string_bytes:
            raise CheckpointError(
                f"string of {count} bytes, expected <= {self.limits.string_bytes}"
            )
        return self.take(count)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def text(self, count: int) -> None:
        self.stack.append(self.string(count).decode("utf-8", "surrogatepass"))

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last MARK."""
        above, self.stack = self.stack, self.marks.pop()
        return above

    def remember(self, index: int) -> None:
        if len(self.memo) >= self.limits.memo:
            raise CheckpointError(f"memo of more than {self.limits.memo} values")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise CheckpointError(f"damaged: memo {index} is empty")
        self.stack.append(self.memo[index])

    def line(self) -> str:
        """One line of text: a name."""
        end = self.data.find(b"\n", self.at, self.at + self.limits.name_bytes)
        if end < 0:
            raise CheckpointError("damaged: a name that does not end")
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def protocol(self) -> None:
        version = self.take(1)[0]
        if not 2 <= version <= 5:
            raise CheckpointError(f"expected pickle protocol 2 to 5, got {version}")

    def frame(self) -> None:
        if self.number(_U64) > len(self.data) - self.at:
            raise CheckpointError("truncated: the pickle's frame is longer than what is left")

    def mark(self) -> None:
        if len(self.marks) >= self.limits.marks:
            raise CheckpointError(f"nested deeper than {self.limits.marks}")
        self.marks.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def long(self, layout: struct.Struct | None) -> None:
        count = self.number(layout) if layout else self.take(1)[0]
        if not 0 <= count <= self.limits.integer_bytes:
            raise CheckpointError(
                f"integer of {count} bytes, expected <= {self.limits.integer_bytes}"
            )
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(items)

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Record):
            target.values.extend(items)
        else:
            raise CheckpointError(f"damaged: values appended to a {type(target).__name__}")

    def set_items(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Record) else target
        if not isinstance(items, dict):
            raise CheckpointError(f"damaged: items set on a {type(target).__name__}")
        if len(flat) % 2:
            raise CheckpointError("damaged: a dictionary key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            items[checked_key(key)] = value

    def dictionary(self) -> None:
        flat = self.pop_mark()
        self.stack.append({})
        self.set_items(flat)

    def add_items(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        if type(target) is not set:
            raise CheckpointError(f"damaged: values added to a {type(target).__name__}")
        target.update(map(checked_key, items))

    def global_named(self) -> None:
        module = self.line()
        self.stack.append(self.constructors.resolve(module, self.line()))

    def global_from_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.constructors.resolve(module, name))

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack.append(self.constructors.call(self.stack.pop(), args))

    def new_object(self, *, keywords: bool = False) -> None:
        kwargs = self.stack.pop() if keywords else None
        args = self.stack.pop()
        self.stack.append(self.constructors.new(self.stack.pop(), args, kwargs))

    def build(self) -> None:
        """Set the state of a record. An OrderedDict's (`_metadata` of a state dict) is dropped."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif type(target) is not OrderedDict:
            what = str(target) if isinstance(target, Name) else type(target).__name__
            raise CheckpointError(f"refused to set the state of {what}")

    def persistent(self) -> None:
        self.stack.append(self.storages.open(self.stack.pop()))


_STOP = pickle.STOP[0]
_NULLARY: dict[bytes, Callable[[Machine], Any]] = {
    pickle.PROTO: Machine.protocol,
    pickle.FRAME: Machine.frame,
    pickle.MARK: Machine.mark,
    pickle.POP: Machine.pop,
    pickle.POP_MARK: Machine.pop_mark,
    pickle.DUP: lambda m: m.push(m.stack[-1]),
    pickle.NONE: lambda m: m.push(None),
    pickle.NEWTRUE: lambda m: m.push(True),
    pickle.NEWFALSE: lambda m: m.push(False),
    pickle.BININT: lambda m: m.push(m.number(_I32)),
    pickle.BININT1: lambda m: m.push(m.take(1)[0]),
    pickle.BININT2: lambda m: m.push(m.number(_U16)),
    pickle.LONG1: lambda m: m.long(None),
    pickle.LONG4: lambda m: m.long(_I32),
    pickle.BINFLOAT: lambda m: m.push(m.number(_F64)),
    pickle.BINUNICODE: lambda m: m.text(m.number(_U32)),
    pickle.SHORT_BINUNICODE: lambda m: m.text(m.take(1)[0]),
    pickle.BINUNICODE8: lambda m: m.text(m.number(_U64)),
    pickle.SHORT_BINSTRING: lambda m: m.text(m.take(1)[0]),
    pickle.BINSTRING: lambda m: m.text(m.number(_U32)),
    pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.take(1)[0])),
    pickle.BINBYTES: lambda m: m.push(m.string(m.number(_U32))),
    pickle.BINBYTES8: lambda m: m.push(m.string(m.number(_U64))),
    pickle.BYTEARRAY8: lambda m: m.push(bytearray(m.string(m.number(_U64)))),
    pickle.EMPTY_DICT: lambda m: m.push({}),
    pickle.EMPTY_LIST: lambda m: m.push([]),
    pickle.EMPTY_SET: lambda m: m.push(set()),
    pickle.EMPTY_TUPLE: lambda m: m.push(()),
    pickle.TUPLE: lambda m: m.push(tuple(m.pop_mark())),
    pickle.TUPLE1: lambda m: m.tuple_of(1),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.LIST: lambda m: m.push(m.pop_mark()),
    pickle.DICT: lambda m: m.dictionary(),
    pickle.FROZENSET: lambda m: m.push(frozenset(map(checked_key, m.pop_mark()))),
    pickle.APPEND: lambda m: m.append([m.stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.pop_mark()),
    pickle.SETITEM: lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    pickle.ADDITEMS: Machine.add_items,
    pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
    pickle.BINPUT: lambda m: m.remember(m.take(1)[0]),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number(_U32)),
    pickle.BINGET: lambda m: m.recall(m.take(1)[0]),
    pickle.LONG_BINGET: lambda m: m.recall(m.number(_U32)),
    pickle.GLOBAL: Machine.global_named,
    pickle.STACK_GLOBAL: Machine.global_from_stack,
    pickle.REDUCE: Machine.reduce,
    pickle.BUILD: Machine.build,
    pickle.NEWOBJ: Machine.new_object,
    pickle.NEWOBJ_EX: lambda m: m.new_object(keywords=True),
    pickle.BINPERSID: Machine.persistent,
}  # fmt: skip
_ACTIONS = {code[0]: action for code, action in _NULLARY.items()}


def _name(code: int) -> str:
    return _OPCODE_NAMES.get(code, f"0x{code:02x}")


__all__ = ["Machine"]
