"""How codes are drawn: the settings and their ranges, seeds, and the noise a picture starts from.

`dar_kernels.guided_sample` draws: guidance, temperature, top-k, top-p, then Gumbel-max. All noise
is a function of a request's own seed and a counter: it never depends on its batch.
Source: REFERENCE §2; Philox4x32-10 from Salmon et al. (2011).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dar_kernels.philox import STREAM_NOISE, open_uniform, philox

MAX_SEED = 2**63 - 1
LARGEST = 1e6  # of scales and temperatures: beyond it logits leave what fp32 can tell apart
COLDEST = 1e-6  # the least temperature above zero


@dataclass(frozen=True, slots=True)
class PerGroup:
    """A setting by groups of codes: value g holds for the codes of group g.

    Args:
        values: one number a group, as many as the model has groups; `Sampling` says which.

    Raises:
        TypeError: where they are no tuple of numbers.
        ValueError: where there are none.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = self.values
        if not isinstance(values, tuple) or not all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        ):
            raise TypeError(f"PerGroup: expected a tuple of numbers, got {values!r}")
        if not values:
            raise ValueError("PerGroup: expected at least one number, got none")


GuidanceScale = float | tuple[float, float] | PerGroup
Temperature = float | PerGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How codes are drawn.

    Args:
        guidance_scale: constant, or (first, last), linear over the codes, or one a group; unguided
            where ≤ 1.
        temperature: 0 is greedy, 1 the model's own distribution; constant, or one a group.
        top_k: codes kept by rank, 0 keeps all.
        top_p: probability mass kept, in (0, 1].

    Raises:
        ValueError: where a value is out of its range or not finite.
    """

    guidance_scale: GuidanceScale = 4.0
    temperature: Temperature = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        scale, warmth = self.guidance_scale, self.temperature
        pair = (scale, scale)
        if isinstance(scale, Sequence) and not isinstance(scale, str):
            pair = scale
        scales = scale.values if isinstance(scale, PerGroup) else pair
        fits = isinstance(scale, PerGroup) or len(scales) == 2
        if not fits or not all(_is_finite(s) for s in scales):
            raise ValueError(
                f"guidance_scale: expected a finite number up to {LARGEST:g}, a pair (first, last) "
                f"or a PerGroup of them, got {scale!r}"
            )
        for value in warmth.values if isinstance(warmth, PerGroup) else (warmth,):
            if not _is_finite(value) or not (value == 0 or value >= COLDEST):
                raise ValueError(
                    f"temperature: expected 0 or a number in [{COLDEST}, {LARGEST:g}], "
                    f"got {value!r}"
                )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected an integer >= 0, got {self.top_k!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")

    def check_groups(self, num_groups: int) -> None:
        """Raise ValueError unless every `PerGroup` has `num_groups` values."""
        for name, value in (
            ("guidance_scale", self.guidance_scale), ("temperature", self.temperature)
        ):  # fmt: skip
            if isinstance(value, PerGroup) and len(value.values) != num_groups:
                raise ValueError(
                    f"{name}: expected {num_groups} values, one a group, got {len(value.values)}"
                )

    def scales(self, num_tokens: int) -> Tensor:
        """Guidance scale of every code, `[N]` fp32.

        Raises:
            ValueError: where a value a group does not divide N codes evenly.
        """
        scale = self.guidance_scale
        if isinstance(scale, PerGroup):
            return _spread("guidance_scale", scale, num_tokens)
        first, last = scale if isinstance(scale, Sequence) else (scale, scale)
        return torch.linspace(first, last, num_tokens, dtype=torch.float32)

    def temperatures(self, num_tokens: int) -> Tensor:
        """Temperature of every code, `[N]` fp32.

        Raises:
            ValueError: where a value a group does not divide N codes evenly.
        """
        if isinstance(self.temperature, PerGroup):
            return _spread("temperature", self.temperature, num_tokens)
        return torch.full((num_tokens,), self.temperature, dtype=torch.float32)

    def guided(self, num_tokens: int, start: int = 0) -> bool:
        """Whether any code from `start` on is guided, so that the null class needs a row."""
        return bool((self.scales(num_tokens)[start:] > 1).any())


def _spread(name: str, setting: PerGroup, num_tokens: int) -> Tensor:
    """`[N]` fp32: each value for N / K codes."""
    K = len(setting.values)
    if num_tokens % K:
        raise ValueError(
            f"{name}: expected a number of values that divides {num_tokens} codes, got {K}"
        )
    return torch.tensor(setting.values, dtype=torch.float32).repeat_interleave(num_tokens // K)


def _is_finite(value: object) -> bool:
    """Whether `value` is a number that the fp32 of the logits can work with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST  # false for NaN


def resolve_seeds(seeds: int | Sequence[int] | Tensor | None, batch: int) -> list[int]:
    """One seed a request: as given, or drawn from torch's generator; an integer s: s, s + 1, …

    Raises:
        ValueError: where their number is not `batch` or one is outside [0, 2^63).
    """
    if seeds is None:
        return torch.randint(0, 2**53, (batch,)).tolist()
    if isinstance(seeds, Tensor):
        if seeds.is_floating_point() or seeds.dtype == torch.bool:
            raise ValueError(f"seeds: expected integers, got {seeds.dtype}")
        seeds = seeds.flatten().tolist()
    if isinstance(seeds, int):
        seeds = range(seeds, seeds + batch)
    if not isinstance(seeds, Sequence):
        raise TypeError(f"seeds: expected integers, got {type(seeds).__name__}")
    values: list[int] = list(seeds)
    if len(values) != batch:
        raise ValueError(f"seeds: expected {batch}, one a picture, got {len(values)}")
    for seed in values:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds: expected integers in [0, 2^63), got {seed!r}")
    return values


def image_noise(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise `[B, *shape]` fp32 for seeds `[B]` int64 (Box-Muller)."""
    count = math.prod(shape)
    blocks = torch.arange(-(-count // 4), device=seeds.device)
    bits = philox(seeds[:, None], blocks, torch.zeros_like(blocks), STREAM_NOISE)
    u = [open_uniform(b) for b in bits]
    radius = [torch.sqrt(-2 * torch.log(v)) for v in u[:2]]
    angle = [2 * math.pi * v for v in u[2:]]
    parts = [f(a) * r for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :count].reshape(len(seeds), *shape)
