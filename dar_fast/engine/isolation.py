"""A batch that fails is run again in halves, so that only those fail that fail alone."""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ran(NamedTuple, Generic[T, R]):
    """What became of a batch."""

    done: list[tuple[list[T], R]]  # parts and their results
    failed: list[tuple[T, Exception]]

    @property
    def retries(self) -> int:
        return len(self.done) + len(self.failed) - 1


def run_isolated(run: Callable[[Sequence[T]], R], items: list[T]) -> Ran[T, R]:
    """`run` of all items at once, or of parts; `run` must leave no trace where it raises."""
    try:
        return Ran([(items, run(items))], [])
    except Exception as error:
        if len(items) == 1:
            return Ran([], [(items[0], error)])
    middle = len(items) // 2  # the exception, and the tensors its frames hold, are gone by now
    parts = [run_isolated(run, part) for part in (items[:middle], items[middle:])]
    return Ran([d for p in parts for d in p.done], [f for p in parts for f in p.failed])


__all__ = ["Ran", "run_isolated"]
