"""Subjects that take turns, as many as a time allows: the least seconds of each count.

On a shared host the memory is half as fast from one second to the next, so nothing that is compared
is timed in one stretch of its own.
"""

import time
from collections.abc import Callable, Mapping
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


def take_turns(
    subjects: Mapping[str, Callable[[], Timing]],
    roofs: Roofs,
    *,
    turns: int,
    budget: float,
    say: Say,
) -> dict[str, Turns]:
    """Run all subjects once a turn, the ceilings before each.

    Args:
        turns: at most so many; at least one.
        budget: seconds; a turn that would outlast it, as long as the last one, is not begun.
    """
    took: dict[str, Turns] = {name: Turns([]) for name in subjects}
    begun = start = time.perf_counter()
    for turn in range(turns):
        now = time.perf_counter()
        if turn and (now - start) + (now - begun) > budget:
            break
        begun = now
        for name, run in subjects.items():
            roofs.probe()
            timing = run()
            took[name].timings.append(timing)
            say(f"turn {turn + 1} of {turns}: {name}: {timing.seconds:.3f} s")
    return took


__all__ = ["Say", "Turns", "take_turns"]
