"""What a training adds to the loop: batches, a loss, work between steps, held-out figures.

A batch is a NamedTuple of tensors whose first dimension is samples; the loop cuts it into
micro-batches, a task only computes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dar_train.draws import Draws
from dar_train.optim import Ema
from dar_train.recipes import Recipe

BatchT = TypeVar("BatchT", bound=tuple[Tensor, ...])
BatchT_co = TypeVar("BatchT_co", bound=tuple[Tensor, ...], covariant=True)


class Loss(NamedTuple):
    """A scalar to minimise and detached scalars to report."""

    total: Tensor
    parts: dict[str, Tensor]


class Batches(Protocol[BatchT_co]):
    """Endless batches in an order that (seed, position) decides; a rank sees its own samples."""

    def next(self) -> BatchT_co:
        """This rank's samples of the next optimizer batch, on the device."""

    def state_dict(self) -> dict[str, Any]:
        """Where it is, in plain JSON, the same on all ranks."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with any number of ranks and workers.

        Raises:
            ValueError: where the state is another data set's.
        """

    def skipped(self) -> Sequence[str]:
        """Samples that could not be read since the last call, each with the reason."""

    def close(self) -> None:
        """Stop the workers."""


class Run(Protocol):
    """What a task may see of the loop between two steps."""

    optimizers: list[torch.optim.Optimizer]
    ema: Ema

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""

    @property
    def done(self) -> float:
        """Fraction of the whole run that is over."""


class Task(Protocol[BatchT]):
    """One training, as the loop sees it."""

    title: str
    batches: Batches[BatchT]

    @property
    def model(self) -> nn.Module:
        """The module to train; its parameters may be shards of those of all ranks."""

    def arrange(self, batch: BatchT, draws: Draws) -> Tensor | None:
        """Rows `[b]` int64 on the host in the order to cut micro-batches in; None: as they come."""

    def loss(self, batch: BatchT, draws: Draws) -> Loss:
        """The mean loss of a micro-batch; every number comes from `draws`."""

    def after_step(self, batch: BatchT, draws: Draws, run: Run) -> dict[str, float]:
        """Work after an optimizer step; returns numbers for the next log line.

        `batch` and `draws` are the last micro-batch's.
        """

    def notes(self) -> dict[str, float]:
        """Further numbers for a log line, counted since the last one; reads from the device."""

    def evaluate(self, averaged: nn.Module, step: int) -> dict[str, float]:
        """Held-out figures of the averaged model, on the first rank."""

    def state_dict(self) -> dict[str, Any]:
        """What to save beside weights and optimizers: plain JSON, or tensors at the top level."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""


def rows_of(batch: BatchT, rows: Tensor) -> BatchT:
    """The samples of `batch` at `rows` `[n]` int64 on the host."""
    first = batch[0]
    where = rows
    if first.device.type == "cuda":
        where = rows.pin_memory().to(first.device, non_blocking=True)
    picked = (tensor[where.to(tensor.device)] for tensor in batch)
    return type(batch)(*picked)


def autocast_of(recipe: Recipe, device: torch.device) -> torch.autocast:
    """The precision of a recipe's passes, to enter again and again."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")
