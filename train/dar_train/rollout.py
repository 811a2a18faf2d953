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
from dar_fast.models.tokenizer import States
from dar_kernels import flow_step


class Flight(NamedTuple):
    """Pictures in flight, oldest first."""

    images: Tensor  # [B, 3, R, R]
    x: Tensor  # [B, 3, R, R], solver states in units of data_std
    velocity: Tensor  # [B, 3, R, R], of the step before
    step: Tensor  # [B] int64, solver steps taken


class Rollout:
    """The pictures in flight of one rank: `fill` once, then `board` new ones, predict, `advance`.

    The host counts along, so nothing is read from the device.
    """

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        S = config.num_steps
        self.num_steps = S
        self.data_std = config.dit.data_std
        self.group_size = config.group_size
        self.times = sampling_times(S, config.dit.time_shift).to(device)  # [S + 1]
        self.host_starts = [
            group_start(i, S, config.num_groups, config.num_tokens) for i in range(S)
        ]
        self.starts = torch.tensor(self.host_starts, device=device)  # [S]
        self.flight: Flight | None = None
        self.taken: list[int] = []  # solver steps of each picture, as `flight.step`

    def fill(self, images: Tensor, noise: Tensor) -> None:
        """Start with `images` `[(S - 1) n, 3, R, R]` at steps S - 1 … 1, mixed with `noise`."""
        count = len(images) // max(1, self.num_steps - 1)
        self.taken = [i for i in range(self.num_steps - 1, 0, -1) for _ in range(count)]
        step = torch.tensor(self.taken, dtype=torch.int64, device=images.device)
        t = self.times[step][:, None, None, None]
        x_1 = self.data_std * images
        self.flight = Flight(images, t * x_1 + (1 - t) * noise, x_1 - noise, step)

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
        self.taken += [0] * len(images)
        return flight

    def states(self, flight: Flight) -> States:
        """What the pixel DiT reads to predict their next steps."""
        return States(flight.x, self.times[flight.step], self.starts[flight.step])

    def tokens_used(self) -> int:
        """How many tokens count in the VQ losses because of the states in flight."""
        return sum(self.host_starts[step] + self.group_size for step in self.taken)

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
        landed = self.taken.count(self.num_steps - 1)  # the oldest come first
        self.taken = [taken + 1 for taken in self.taken[landed:]]
        self.flight = Flight(*(part[landed:] for part in (images, x, last, step + 1)))

    def tensors(self, positions: Tensor, total: int) -> dict[str, Tensor]:
        """For a saved state: `[S - 1, total, …]`, zeros but where this rank's pictures are.

        `positions` `[n]` are those of its pictures in the batch: the sum over ranks has them all.
        """
        if self.flight is None:
            return {}
        whole = {}
        for name, part in self.flight._asdict().items():
            mine = part.view(-1, len(positions), *part.shape[1:])
            places = mine.new_zeros(len(mine), total, *part.shape[1:])
            places[:, positions.to(part.device)] = mine
            whole[f"rollout.{name}"] = places
        return whole

    def load(self, tensors: dict[str, Tensor], positions: Tensor) -> None:
        """Restore this rank's pictures from what `tensors` of all ranks sum up to."""
        parts = [tensors[f"rollout.{field}"] for field in Flight._fields]
        mine = (part[:, positions.to(part.device)].flatten(0, 1) for part in parts)
        self.flight = Flight(*(part.to(self.times.device) for part in mine))
        self.taken = self.flight.step.tolist()
