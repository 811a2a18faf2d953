"""Subjects that take turns, as many as a time allows: the least seconds of each count.

On a shared host the memory is half as fast from one second to the next, so nothing that is compared
is timed in one stretch of its own.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from dar_fast.bench.measure import Roofs
from dar_fast.bench.ours import Timing

Say = Callable[[str], None]


class Turns(NamedTuple):
    """All timings of one subject, in order."""

    timings: list[Timing]

    @property
    def seconds(self) -> float:
        """The least."""
        return min(t.seconds for t in self.timings)

    @property
    def first_preview(self) -> float:
        """The least."""
        return min(t.first_preview for t in self.timings)

    @property
    def all_seconds(self) -> list[float]:
        """Of every turn."""
        return [round(t.seconds, 6) for t in self.timings]


def turns_within(turns: int, budget: float) -> Iterator[int]:
    """The numbers of the turns, from 1, that a time allows.

    Args:
        turns: at most so many; at least one.
        budget: seconds; a turn that would outlast it, as long as the last one, is not begun.
    """
    begun = start = time.perf_counter()
    for turn in range(1, turns + 1):
        now = time.perf_counter()
        if turn > 1 and (now - start) + (now - begun) > budget:
            return
        begun = now
        yield turn


def take_turns(
    subjects: Mapping[str, Callable[[], Timing]],
    roofs: Roofs,
    *,
    turns: int,
    budget: float,
    say: Say,
) -> dict[str, Turns]:
    """Run all subjects once a turn of `turns_within`, the ceilings before each."""
    took: dict[str, Turns] = {name: Turns([]) for name in subjects}
    for turn in turns_within(turns, budget):
        for name, run in subjects.items():
            roofs.probe()
            timing = run()
            took[name].timings.append(timing)
            say(f"turn {turn} of {turns}: {name}: {timing.seconds:.3f} s")
    return took


__all__ = ["Say", "Turns", "take_turns", "turns_within"]
