"""What stands for a class or an object of somebody else's code: its name and data, never itself."""

from dataclasses import dataclass, field
from typing import Any

from dar_fast.checkpoint.errors import CheckpointError, Limits


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names. It was not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object of a class we do not know: what the pickle says about it, and nothing done with it.

    `args` and `kwargs` went to its constructor, `state` to its `__setstate__` or `__dict__`;
    `items` and `values` are what a subclass of dict or list holds.
    """

    module: str
    name: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Record({self.module}.{self.name})"

    def plain(self) -> dict[str, Any]:
        """The dict inside: of an argparse.Namespace its attributes, of a dict-like config its
        `_data` (omegaconf: `_content`), of a subclass of dict its items; records in it likewise.

        Raises:
            CheckpointError: where it holds itself, nests too deep, or is no dict at all.
        """
        value = plain(self)
        if not isinstance(value, dict):
            raise CheckpointError(f"expected a dict inside {self!r}, got {type(value).__name__}")
        return value


def plain(value: object, limits: Limits | None = None) -> Any:
    """`value` with every record in it replaced by the dict, list or value it holds."""
    return _Plain(limits or Limits()).convert(value)


class _Plain:
    """One conversion. Values are counted: shared references make a large tree of a short pickle."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.visited = 0
        self.open: list[int] = []  # the containers around the current value

    def convert(self, value: object) -> Any:
        self.visited += 1
        if self.visited > self.limits.plain_values:
            raise CheckpointError(f"config of more than {self.limits.plain_values} values")
        if not isinstance(value, dict | list | tuple | set | frozenset | Record):
            return value
        if id(value) in self.open:
            raise CheckpointError("config refers to itself")
        if len(self.open) >= self.limits.depth:
            raise CheckpointError(f"config nests deeper than {self.limits.depth}")
        self.open.append(id(value))
        converted = self._container(value)
        self.open.pop()
        return converted

    def _container(self, value: object) -> Any:
        if isinstance(value, dict):
            return {str(key): self.convert(item) for key, item in value.items()}
        if isinstance(value, Record):
            return self._record(value)
        assert isinstance(value, list | tuple | set | frozenset)
        items = [self.convert(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items

    def _record(self, record: Record) -> Any:
        if record.items or record.values:
            return self.convert(record.items or record.values)
        state = record.state
        if isinstance(state, tuple) and len(state) == 2:  # (__dict__, __slots__)
            state = {**_dict_or_empty(state[0]), **_dict_or_empty(state[1])}
        if isinstance(state, dict):
            for key in ("_data", "_content", "_val"):
                if key in state:
                    return self.convert(state[key])
            return self.convert(state)
        if record.args and all(isinstance(a, str | int | float) for a in record.args):
            first = record.args[0]
            return first if len(record.args) == 1 else "/".join(map(str, record.args))  # enum; path
        return {}


def _dict_or_empty(value: object) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def check_depth(root: object, limit: int) -> None:
    """Refuse a result that nests deeper than `limit`: its longest path, found without recursion.

    References back to an enclosing container do not count. One visit a container: O(values).
    """
    height: dict[int, int] = {}
    entered: set[int] = set()
    stack: list[tuple[object, int]] = [(root, 1)]  # depth of entry; 0 marks the way back
    while stack:
        node, depth = stack.pop()
        if not depth:
            inner = max((height.get(id(c), 0) for c in _children(node)), default=0)
            height[id(node)] = depth = inner + 1
        elif id(node) not in entered and isinstance(
            node, dict | list | tuple | set | frozenset | Record
        ):
            entered.add(id(node))
            stack.append((node, 0))
            stack.extend((child, depth + 1) for child in _children(node))
        else:
            continue
        if depth > limit:
            raise CheckpointError(f"nested deeper than {limit}")


def _children(node: object) -> list[Any]:
    if isinstance(node, Record):
        return [node.args, node.kwargs, node.state, node.items, node.values]
    if isinstance(node, dict):
        return list(node.values())
    assert isinstance(node, list | tuple | set | frozenset)
    return list(node)


__all__ = ["Name", "Record", "check_depth", "plain"]
