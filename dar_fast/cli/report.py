"""What a command says: lines, tables or one JSON document on stdout, the rest on stderr."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PATIENCE_S = 2.0  # work expected to be shorter gets no bar
FIRST_LOOK_S = 0.3


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(text + "\n")


def notice(text: str) -> None:
    """A line on stderr, for what the user should know and a pipe should not read."""
    sys.stderr.write(f"dar: {text}\n")


def say_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    say(json.dumps(document, indent=2))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, numbers to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        numeric = all(row[i][:1].isdigit() or row[i][:1] in "-∞" for row in rows)
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout, highlight=False)
    console.print(drawn, soft_wrap=not console.is_terminal)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on stderr while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=sys.stderr).status(text):
        yield


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, if that is a terminal and the work looks longer than two seconds.

    Yields a function to call after each of the `total` parts.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )
    task = bar.add_task(text, total=total)
    start = time.perf_counter()
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        bar.update(task, completed=done)
        elapsed = time.perf_counter() - start
        if (
            not bar.live.is_started
            and elapsed > FIRST_LOOK_S
            and elapsed / done * total > PATIENCE_S
        ):
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
