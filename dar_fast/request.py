"""One call of the pipeline, checked in full before any work: everything after this trusts it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dar_fast.config import TokenizerConfig
from dar_fast.flow import SOLVERS, Solver
from dar_fast.images import OUTPUT_TYPES, OutputType
from dar_fast.labels import ClassLabels, label_ids
from dar_fast.sampling import GuidanceScale, Sampling, Temperature, resolve_seeds

MAX_STEPS = 10_000  # a thousand times what pictures need; fp32 times stay apart

Seeds = int | Sequence[int] | Tensor
StepCallback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to draw: B pictures with one seed each, and settings that they share."""

    labels: Tensor  # [B] int64
    seeds: list[int]  # B
    sampling: Sampling
    num_steps: int  # S
    solver: Solver
    prefix_codes: Tensor | None  # [B, P] int64
    num_groups: int  # G in [1, K]
    early: bool  # G < K: the result is the jump estimate
    output_type: OutputType
    callback: StepCallback | None


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """`value`, an integer in [low, high]; else TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}], got {value}")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}")


def _prefix(prefix_codes: object, batch: int, config: TokenizerConfig) -> Tensor | None:
    """`[B, P]` from `[B, P]`, `[1, P]` or `[P]`; None where there is nothing to fix."""
    if prefix_codes is None:
        return None
    if not isinstance(prefix_codes, Tensor):
        raise TypeError(f"prefix_codes: expected a tensor, got {type(prefix_codes).__name__}")
    N, V = config.num_tokens, config.codebook_size
    shape = list(prefix_codes.shape)
    codes = prefix_codes[None] if prefix_codes.ndim == 1 else prefix_codes
    if prefix_codes.dtype != torch.int64 or codes.ndim != 2 or len(codes) not in (1, batch):
        raise ValueError(
            f"prefix_codes: expected int64 [{batch}, P] or [P], got {prefix_codes.dtype} {shape}"
        )
    if codes.shape[1] > N:
        raise ValueError(f"prefix_codes: expected at most {N} codes, got {codes.shape[1]}")
    if not codes.numel():
        return None
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= V:
        raise ValueError(
            f"prefix_codes: expected values in [0, {V}), got {low if low < 0 else high}"
        )
    return codes.expand(batch, -1)


def make_request(
    class_labels: ClassLabels,
    *,
    label_names: Mapping[str, int],
    num_classes: int,
    config: TokenizerConfig,
    seeds: Seeds | None,
    guidance_scale: GuidanceScale,
    temperature: Temperature,
    top_k: int,
    top_p: float,
    num_inference_steps: int | None,
    solver: Solver,
    prefix_codes: Tensor | None,
    num_groups: int | None,
    output_type: OutputType,
    callback_on_step_end: StepCallback | None,
) -> Request:
    """The checked request; see `DARPipeline.__call__` for the arguments.

    Raises:
        TypeError: where an argument has a wrong type.
        ValueError: where one is out of its range: "name: expected …, got …".
    """
    ids = label_ids(class_labels, label_names, num_classes)
    sampling = Sampling(
        guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p
    )
    steps = config.num_steps
    if num_inference_steps is not None:
        steps = check_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    check_choice("solver", solver, SOLVERS)
    K = config.num_groups
    sampling.check_groups(K)
    groups = K if num_groups is None else check_integer("num_groups", num_groups, 1, K)
    check_choice("output_type", output_type, OUTPUT_TYPES)
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise TypeError(
            f"callback_on_step_end: expected a callable, got {type(callback_on_step_end).__name__}"
        )
    return Request(
        labels=torch.tensor(ids, dtype=torch.int64),
        prefix_codes=_prefix(prefix_codes, len(ids), config),
        seeds=resolve_seeds(seeds, len(ids)),
        sampling=sampling,
        num_steps=steps,
        solver=solver,
        num_groups=groups,
        early=groups < K,
        output_type=output_type,
        callback=callback_on_step_end,
    )


__all__ = [
    "MAX_STEPS", "Request", "Seeds", "StepCallback", "check_choice", "check_integer",
    "make_request",
]  # fmt: skip
