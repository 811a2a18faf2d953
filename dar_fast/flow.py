"""The diffusion side: time shift, condition schedule, solvers and previews.

x_t = t x_1 + (1 - t) x_0, v = x_1 - x_0, x_1 = data_std * image; times t_i = s(i / S) with
s(u) = u / (u + beta (1 - u)). Euler: x += h v; Adams-Bashforth 2: x += h (1.5 v_i - 0.5 v_{i-1})
with plain weights, first step Euler. Previews are by-products of the trajectory: no network
evaluation.
Source: arXiv 2505.23660, §3.2; REFERENCE §4.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dar_kernels.flow_step import PREVIEWS, SOLVERS, Preview, Solver, flow_step


def shift_time(u: Tensor, beta: float) -> Tensor:
    """s(u) = u / (u + beta (1 - u)), [0, 1] to itself; beta > 1 spends more steps near noise."""
    return u / (u + beta * (1 - u))


def sampling_times(num_steps: int, beta: float) -> Tensor:
    """`[S + 1]` fp32 times from 0 to exactly 1."""
    return shift_time(torch.arange(num_steps + 1, dtype=torch.float32) / num_steps, beta)


def group_start(step: int, num_steps: int, num_groups: int, num_tokens: int) -> int:
    """First token of the group that step i of S reads: group floor(i / S K + 0.5), clamped."""
    group_size = num_tokens // num_groups
    group = math.floor(step / num_steps * num_groups + 0.5)
    return min(group * group_size, num_tokens - group_size)


def drawn_group_start(u: Tensor, num_groups: int, num_tokens: int) -> Tensor:
    """First tokens `[B]` int64 of the groups that training draws with `u` `[B]` in [0, 1)."""
    group_size = num_tokens // num_groups
    start = torch.floor(u * num_groups + 0.5).long() * group_size
    return start.clamp(max=num_tokens - group_size)


@dataclass(slots=True)
class Trajectory:
    """One solver run: `advance` takes a velocity; the preview of the last step is then at hand.

    Args:
        x: the state at the first time, `[B, 3, R, R]` fp32 or fp64, in units of `data_std`; copied,
            because every step changes the run's own in place.
        times: `[S + 1]`, as `sampling_times` gives them.
        kind: of the preview: "jump", the paper's x + (1 - t) v, or "solver", with the solver's
            slope for v, the official one.
        step: the next step; > 0 after an SDEdit-style start.
    """

    x: Tensor
    times: list[float]
    data_std: float
    solver: Solver = "adams2"
    kind: Preview = "jump"
    step: int = 0
    _previous: Tensor | None = field(init=False, default=None)  # velocity of the step before
    _preview: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.x = self.x.clone(memory_format=torch.contiguous_format)
        if self.solver == "adams2":
            self._previous = torch.empty_like(self.x)

    @property
    def time(self) -> float:
        """t of the next evaluation."""
        return self.times[self.step]

    @property
    def done(self) -> bool:
        return self.step == len(self.times) - 1

    def advance(self, velocity: Tensor) -> None:
        """Take one step along `velocity` `[B, patches, 3 P P]`, evaluated at (x, time).

        Any P that divides R will do: one patch, `[B, 1, 3 R R]`, is a picture.
        """
        patch_size = self.x.shape[-1] // math.isqrt(velocity.shape[1])
        self._preview = flow_step(
            self.x, velocity, self._previous, self.time, self.times[self.step + 1], self.data_std,
            self.solver, patch_size, first=self._preview is None, preview=self.kind,
        )  # fmt: skip
        self.step += 1

    def preview(self) -> Tensor:
        """The estimate of the picture after the last step, in image units, not clamped."""
        if self._preview is None:
            raise ValueError("Trajectory.preview: expected at least one step, got none")
        return self._preview

    def image(self) -> Tensor:
        """The state in image units: the picture once `done`."""
        return self.x / self.data_std


def start_from(image: Tensor, noise: Tensor, t: float, data_std: float) -> Tensor:
    """SDEdit-style start: the state `(1 - t) noise + t data_std image` at time t."""
    return (1 - t) * noise + t * data_std * image


__all__ = [
    "PREVIEWS", "SOLVERS", "Preview", "Solver", "Trajectory", "drawn_group_start", "group_start",
    "sampling_times", "shift_time", "start_from",
]  # fmt: skip
