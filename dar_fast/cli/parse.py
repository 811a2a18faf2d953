"""Typed functions to command lines: tyro reads the flags, and its error boxes become one line."""

import contextlib
import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

T = TypeVar("T")
_FRAME = " ╭╮╰╯│─|+"  # what tyro draws its boxes with
_OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")
_UNREAD = re.compile(r"Error parsing (\S+): .*?(int|INT|float|FLOAT)\b.*?['\"](.*)['\"]")
_CHOICE = re.compile(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)")
_APART = re.compile(r"Unrecognized options: ([^-].*)")
_REFUSED = re.compile(r"^Error parsing \w+: ")  # by the type itself, which says it all
_MISSING = re.compile(r"Missing from [\w ]+: (\S+)")


def brief(box: str, program: str) -> str:
    """The first section of one of tyro's error boxes, and the option it suggests, on one line."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first line is the title in the frame
        text = line.strip(_FRAME)
        if text.strip("-"):  # frames are ASCII where the terminal is
            sections[-1].append(text)
        elif sections[-1]:
            sections.append([])
    text = plain(" ".join(sections[0]) or "the command line cannot be read")
    hints = [s for s in sections[1:] if s and s[0].startswith("Perhaps")]
    near = _OPTION.search(" ".join(hints[0][1:])) if hints else None
    if near:
        return f"{text.rstrip('.')}; did you mean {near[0]}?"
    return f"{text.rstrip('.')}; see {program} --help"


def plain(text: str) -> str:
    """tyro's words for the commonest mistakes in ours: option, what was expected, what came."""
    if found := _UNREAD.match(text):
        kind = "an integer" if found[2].lower() == "int" else "a number"
        return f"{found[1].rstrip(':')}: expected {kind}, got {found[3]!r}"
    if found := _CHOICE.match(text):
        choices = sorted(choice for choice in found[3].split(", ") if choice != "'None'")
        return f"{found[2]}: expected one of {', '.join(choices)}, got {found[1]!r}"
    if found := _MISSING.match(text):
        return f"expected {found[1]}, got none"
    if found := _APART.match(text):
        return f"expected names and files together, before the options, got {found[1]!r} apart"
    return _REFUSED.sub("", text)


def run_command(command: Callable[..., None], argv: Sequence[str], program: str) -> None:
    """Parse `argv` for `command` and run it.

    Raises:
        ValueError: where the arguments do not parse; and whatever the command raises.
    """
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    read_flags(_recorder(command, calls), argv, program, config=(tyro.conf.FlagCreatePairsOff,))
    for arguments, options in calls:
        command(*arguments, **options)


def read_flags(
    kind: Callable[..., T],
    argv: Sequence[str],
    program: str,
    *,
    description: str | None = None,
    config: Sequence[Any] = (),
) -> T:
    """What tyro makes of `argv` for a dataclass or a function.

    Raises:
        ValueError: where the arguments do not parse, or `kind` itself refuses them.
        SystemExit: with status 0, where help was asked for.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                kind, prog=program, args=list(argv), description=description, config=config
            )
    except SystemExit as leaving:
        if leaving.code in (None, 0):
            raise
        raise ValueError(brief(errors.getvalue(), program)) from None


def _recorder(
    command: Callable[..., None], calls: list[tuple[tuple[object, ...], dict[str, object]]]
) -> Callable[..., None]:
    """`command` for tyro to call: it records the call, and the command runs outside the parser."""

    @functools.wraps(command)
    def record(*arguments: object, **options: object) -> None:
        calls.append((arguments, options))

    return record
