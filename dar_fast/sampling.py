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

GuidanceScale = float | tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How codes are drawn.

    Args:
        guidance_scale: constant, or (first, last), linear over the codes; unguided where ≤ 1.
        temperature: 0 is greedy, 1 the model's own distribution.
        top_k: codes kept by rank, 0 keeps all.
        top_p: probability mass kept, in (0, 1].

    Raises:
        ValueError: where a value is out of its range or not finite.
    """

    guidance_scale: GuidanceScale = 4.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        pair = (
            scale if isinstance(scale, Sequence) and not isinstance(scale, str) else (scale, scale)
        )
        if len(pair) != 2 or not all(_is_finite(s) for s in pair):
            raise ValueError(
                f"guidance_scale: expected a finite number up to {LARGEST:g} or a pair "
                f"(first, last) of them, got {scale!r}"
            )
        if not _is_finite(self.temperature) or not (
            self.temperature == 0 or self.temperature >= COLDEST
        ):
            raise ValueError(
                f"temperature: expected 0 or a number in [{COLDEST}, {LARGEST:g}], "
                f"got {self.temperature!r}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k: expected an integer >= 0, got {self.top_k!r}")
        if not _is_finite(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")

    def scales(self, num_tokens: int) -> Tensor:
        """Guidance scale of every code, `[N]` fp32."""
        scale = self.guidance_scale
        first, last = scale if isinstance(scale, Sequence) else (scale, scale)
        return torch.linspace(first, last, num_tokens, dtype=torch.float32)


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
