"""What a request tells while it runs, in this order: codes and previews, then one end."""

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished request; tensors on the CPU."""

    image: Tensor | None  # [3, R, R] fp32 in image units, not clamped; None with output "codes"
    codes: Tensor  # [G Q] int64
    label: int
    seed: int  # the same request with this seed gives the same codes and picture
    noise_seed: int
    scores: tuple[float, ...] | None  # of the candidates of `best_of`, in order of their seeds
    queued_seconds: float  # from submission to the first group
    seconds: float  # from submission to the end


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupDrawn:
    """A group of codes was drawn."""

    group: int  # 0 … G - 1
    codes: Tensor  # [Q] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """A solver step was taken."""

    step: int  # steps done, 1 … S
    image: Tensor  # [3, R, R] fp32: the jump estimate in image units, not clamped
    codes: Tensor  # [n] int64: those that the estimate has read


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The winner among the candidates of `best_of`; previews from here on are its own."""

    seed: int
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The end of a request that went well."""

    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The end of a request that did not: cancelled, too late, or failed with `error.__cause__`."""

    error: Exception


Event: TypeAlias = GroupDrawn | Preview | Chosen | Finished | Failed

__all__ = ["Chosen", "Event", "Failed", "Finished", "GroupDrawn", "Preview", "Result"]
