"""Training on the solver's own states: pictures in flight, one solver step an optimizer step.

Flow matching shows the pixel DiT states mixed from the true picture, so at late times it learns to
read them and not the codes; while sampling its states hold only what the codes have told it so far.
Each picture in flight starts from noise and takes one solver step with the velocity just predicted;
the loss is what its jump estimate misses of the picture, |x + (1 - t) v - x_1|^2 / data_std^2. One
evaluation of the pixel DiT a picture and step, as for a draw of flow matching. Not published.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dar_fast.config import TokenizerConfig
from dar_fast.flow import group_start, sampling_times
from dar_kernels import flow_step


class Flight(NamedTuple):
    """Pictures in flight, oldest first."""

    images: Tensor  # [B, 3, R, R]
    x: Tensor  # [B, 3, R, R], solver states in units of data_std
    velocity: Tensor  # [B, 3, R, R], of the step before
    step: Tensor  # [B] int64, solver steps taken


class Rollout:
    """The pictures in flight of one run: `board` new ones, predict, then `advance`."""

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        S = config.num_steps
        self.num_steps = S
        self.data_std = config.dit.data_std
        self.times = sampling_times(S, config.dit.time_shift).to(device)  # [S + 1]
        starts = [group_start(i, S, config.num_groups, config.num_tokens) for i in range(S)]
        self.starts = torch.tensor(starts, device=device)  # [S]
        self.flight: Flight | None = None

    def fill(self, images: Tensor, noise: Tensor) -> None:
        """Start with `images` `[S n, 3, R, R]` spread over all steps, between noise and each."""
        count = len(images) // self.num_steps
        step = torch.arange(self.num_steps - 1, -1, -1, device=images.device)
        step = step.repeat_interleave(count)
        t = self.times[step][:, None, None, None]
        x_1 = self.data_std * images
        self.flight = Flight(images, t * x_1 + (1 - t) * noise, x_1 - noise, step)
        self._land()

    def board(self, images: Tensor, noise: Tensor) -> Flight:
        """All pictures in flight, `images` `[n, 3, R, R]` the newest; they start from `noise`."""
        new = Flight(
            images, noise, torch.zeros_like(noise),
            torch.zeros(len(images), dtype=torch.int64, device=images.device),
        )  # fmt: skip
        flight = new
        if self.flight is not None:
            flight = Flight(*(torch.cat(pair) for pair in zip(self.flight, new, strict=True)))
        self.flight = flight
        return flight

    def loss(self, flight: Flight, velocity: Tensor) -> Tensor:
        """Mean square of what each jump estimate misses of its picture, in image units."""
        t = self.times[flight.step][:, None, None, None]
        estimate = flight.x + (1 - t) * velocity
        return (estimate / self.data_std - flight.images).square().mean()

    @torch.no_grad()
    def advance(self, velocity: Tensor) -> None:
        """One Adams-Bashforth step along the predicted `velocity`; finished pictures leave."""
        if self.flight is None:
            raise ValueError("Rollout.advance: expected pictures in flight, got none")
        images, x, last, step = self.flight
        x, last = x.clone(), last.clone()  # changed in place, and the backward pass may need them
        one_patch = velocity.flatten(1)[:, None]  # [B, 1, 3 R R]
        flow_step(
            x, one_patch, last, self.times[step], self.times[step + 1], self.data_std, "adams2",
            x.shape[-1], first=step == 0,
        )  # fmt: skip
        self.flight = Flight(images, x, last, step + 1)
        self._land()

    def _land(self) -> None:
        if self.flight is not None:
            flying = self.flight.step < self.num_steps
            self.flight = Flight(*(part[flying] for part in self.flight))

    def tensors(self) -> dict[str, Tensor]:
        """For a saved state."""
        if self.flight is None:
            return {}
        return {f"rollout.{k}": v.contiguous() for k, v in self.flight._asdict().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore `tensors`; starts empty where there are none."""
        parts = [tensors.get(f"rollout.{field}") for field in Flight._fields]
        known = [part.to(self.times.device) for part in parts if part is not None]
        self.flight = Flight(*known) if len(known) == len(Flight._fields) else None
