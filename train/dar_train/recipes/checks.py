"""Types and ranges of a recipe's fields, and the sentences that say what was expected."""

import difflib
import math
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

NONE = "none"  # how a file says that an optional field is not set
_PLAIN = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
}


class Rule(NamedTuple):
    """The values that a field takes, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


class Clash(NamedTuple):
    """Values that are sound by themselves and wrong together; it is looked for among such only."""

    fields: tuple[str, ...]
    clashes: Callable[[Any], bool]  # of the recipe
    message: Callable[[Any], str]


POSITIVE = Rule("a positive number", lambda x: 0 < x < math.inf)
NOT_NEGATIVE = Rule("a number >= 0", lambda x: 0 <= x < math.inf)
FRACTION = Rule("a number in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_ONE = Rule("a number in [0, 1)", lambda x: 0 <= x < 1)


def hints(cls: type) -> dict[str, Any]:
    """Field names and types of a dataclass."""
    found = get_type_hints(cls)
    return {name: hint for name, hint in found.items() if get_origin(hint) is not ClassVar}


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def expected_type(hint: Any) -> str:
    """A type in words: "an integer", "one of 'a', 'b'", "2 numbers"."""
    options = _options(hint)
    if len(options) > 1:
        return " or ".join(NONE if o is type(None) else expected_type(o) for o in options)
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, get_args(hint)))}"
    if get_origin(hint) is tuple:
        members = get_args(hint)
        plural = {float: "numbers", str: "texts", Path: "paths"}[members[0]]
        return f"a list of {plural}" if members[-1] is ... else f"{len(members)} {plural}"
    return _PLAIN[hint]


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of type `hint`; a whole number is a number, true is none."""
    options = _options(hint)
    if len(options) > 1:
        return any(fits(value, option) for option in options)
    if hint is type(None):
        return value is None
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        members = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if members[-1] is not ... and len(value) != len(members):
            return False
        return all(fits(member, members[0]) for member in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def from_file(value: Any, hint: Any) -> Any:
    """A value of a TOML file as the field's type where it can be one, else as it is."""
    options = _options(hint)
    if len(options) > 1:
        if value == NONE and type(None) in options:
            return None
        return from_file(value, next(o for o in options if o is not type(None)))
    if get_origin(hint) is tuple and isinstance(value, list):
        return tuple(from_file(member, get_args(hint)[0]) for member in value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**53 else value
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where nothing is near."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def of_known(field: str, name: str, known: Iterable[str]) -> str:
    """A problem: `name` is not among the known names."""
    known = list(known)
    return f"{field}: expected one of {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"
