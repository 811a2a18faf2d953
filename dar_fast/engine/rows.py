"""What the scheduler hands to the runners: one row a request, host values only."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dar_fast.flow import Solver
from dar_kernels.decoder_weights import DecoderPages


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One request in one group of Q decode steps."""

    slot: int
    label: int
    seed: int
    position: int  # of the first code to draw; a multiple of Q
    guidance: tuple[float, ...]  # Q scales; unguided where <= 1
    temperature: float
    top_k: int
    top_p: float
    pages: tuple[int, ...]  # of the conditional row, enough for position + Q inputs
    null_pages: tuple[int, ...] | None  # of the null row; None: the request is unguided
    forced: tuple[int, ...] = ()  # the first codes of the group that are given, at most Q


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One request in one solver step."""

    slot: int
    step: int  # 0 … num_steps - 1
    num_steps: int
    solver: Solver


class TokenRunner(Protocol):
    """Draws one group for every row; a row's codes depend on that row alone."""

    pages: DecoderPages

    def run(self, rows: Sequence[TokenRow]) -> Tensor:
        """Codes int64 `[B, Q]`, which are also in the slots' codes, at the rows' positions."""

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first page of each pair to the second, in every layer."""


__all__ = ["StepRow", "TokenRow", "TokenRunner"]
