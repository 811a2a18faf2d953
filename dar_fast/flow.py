"""The diffusion side: time shift, condition schedule, solvers and previews.

x_t = t x_1 + (1 - t) x_0, v = x_1 - x_0, x_1 = data_std * image; times t_i = s(i / S) with
s(u) = u / (u + beta (1 - u)). Euler: x += h v; Adams-Bashforth 2: x += h (1.5 v_i - 0.5 v_{i-1})
with plain weights, first step Euler. Previews are by-products of the trajectory: no network
evaluation.
Source: arXiv 2505.23660, §3.2; REFERENCE §4.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Solver = Literal["adams2", "euler"]
Preview = Literal["jump", "solver"]
SOLVERS: tuple[Solver, ...] = ("adams2", "euler")
PREVIEWS: tuple[Preview, ...] = ("jump", "solver")


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
    """One solver run: `advance` takes a velocity; the previews of the last step are then at hand.

    Args:
        x: the state at the first time, `[B, 3, R, R]`, in units of `data_std`.
        times: `[S + 1]`, as `sampling_times` gives them.
        step: the next step; > 0 after an SDEdit-style start.
    """

    x: Tensor
    times: list[float]
    data_std: float
    solver: Solver = "adams2"
    step: int = 0
    _jump: Tensor | None = None
    _clip: Tensor | None = None
    _last: Tensor | None = None

    @property
    def time(self) -> float:
        """t of the next evaluation."""
        return self.times[self.step]

    @property
    def done(self) -> bool:
        return self.step == len(self.times) - 1

    def advance(self, velocity: Tensor) -> None:
        """Take one step along `velocity` `[B, 3, R, R]`, evaluated at (x, time)."""
        t, h = self.time, self.times[self.step + 1] - self.time
        slope = velocity
        if self.solver == "adams2" and self._last is not None:
            slope = 1.5 * velocity - 0.5 * self._last
        self._jump = self.x + (1 - t) * velocity
        self._clip = self.x + (1 - t) * slope
        self.x = self.x + h * slope
        self._last = velocity
        self.step += 1

    def preview(self, kind: Preview = "jump") -> Tensor:
        """The estimate of the picture after the last step, in image units, not clamped.

        "jump" is the paper's x + (1 - t) v; "solver" uses the solver's slope, the official preview.
        """
        estimate = self._jump if kind == "jump" else self._clip
        if estimate is None:
            raise ValueError("Trajectory.preview: expected at least one step, got none")
        return estimate / self.data_std

    def image(self) -> Tensor:
        """The state in image units: the picture once `done`."""
        return self.x / self.data_std


def start_from(image: Tensor, noise: Tensor, t: float, data_std: float) -> Tensor:
    """SDEdit-style start: the state `(1 - t) noise + t data_std image` at time t."""
    return (1 - t) * noise + t * data_std * image
