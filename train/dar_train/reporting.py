"""Where a run's numbers go: log lines, a progress bar on a terminal, JSON lines, TensorBoard."""

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from dar_fast.files import atomic_write

logger = logging.getLogger("dar_train")


@contextmanager
def shown_logs() -> Iterator[None]:
    """Send this package's log lines to standard output meanwhile; for command lines only."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def short(metrics: Mapping[str, float]) -> str:
    """Metrics as one line."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


class Report:
    """Writes metrics to `metrics.jsonl` and, where it is installed, TensorBoard.

    A progress bar shows on a terminal only; everywhere else `log` lines are all there is. Lines of
    steps after `step`, of a call that did not get to save them, are dropped: they come again.
    Ranks but the first write nothing.
    """

    def __init__(self, out: Path, title: str, step: int = 0, first: bool = True) -> None:
        self._bar: Any = None
        self._lines: IO[str] | None = None
        self._board: Any = None
        if not first:
            return
        out.mkdir(parents=True, exist_ok=True)
        keep_until(out / "metrics.jsonl", step)
        self._lines = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _tensorboard(out / "tensorboard", step)
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>4.0f}% {task.fields[note]}"),
                TimeElapsedColumn(),
            )
            self._task = self._bar.add_task(title, total=1.0, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._lines is not None:
            self._lines.close()
        if self._board is not None:
            self._board.close()

    def progress(self, done: float, note: str) -> None:
        """Move the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)

    def write(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """One JSON line, one log line, one point a curve."""
        if self._lines is None:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 1), **metrics}
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        logger.info("%s step %d  %s", kind, step, short(metrics))


def keep_until(file: Path, step: int) -> None:
    """Drop lines of later steps than `step`, and one that was cut off, from a metrics file."""
    if not file.is_file():
        return
    kept, lines = [], file.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        with suppress(json.JSONDecodeError):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
    if len(kept) < len(lines):
        with atomic_write(file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.info("no TensorBoard curves: install the package tensorboard for them")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
