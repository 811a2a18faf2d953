"""A request for one picture, checked against a model before it is queued."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.flow import SOLVERS, Solver, group_start
from dar_fast.request import MAX_STEPS, check_choice, check_integer
from dar_fast.sampling import MAX_SEED, Sampling, resolve_seeds

Output = Literal["image", "codes"]
OUTPUTS: tuple[Output, ...] = ("image", "codes")


class Candidates(NamedTuple):
    """What a scorer sees of the n candidates of a request, on the CPU."""

    previews: Tensor  # [n, 3, R, R] fp32, jump estimates in image units
    codes: Tensor  # [n, g Q] int64
    label: int


Scorer = Callable[[Candidates], Sequence[float] | Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """Draw n candidates for g groups, score their previews, finish the one that scores highest.

    Candidate i has the request's seed + i.
    """

    count: int  # n >= 2
    groups: int  # g in [1, G)
    scorer: Scorer | str = "class_score"  # or the name of a built-in one, see scoring.py


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One picture.

    Args:
        label: class id.
        seed: of the codes, in [0, 2^63); None: drawn at submission.
        sampling: guidance, temperature and filters.
        num_steps: S solver steps; None: the tokenizer's number.
        solver: "adams2" or "euler".
        prefix_codes: the first codes, given: `[P]`, integers.
        num_groups: draw only the first G groups; G < K: the picture is the jump estimate there.
        noise_seed: of the noise that the picture starts from; None: the seed of the codes.
        output: "image", or "codes", which takes no solver step.
        previews: whether each solver step, and with output "codes" each group, makes an event.
        priority: higher goes first; who waits rises.
        deadline: seconds from submission; a request that is not done by then is dropped.
        best_of: choose among candidates by their previews.
    """

    label: int
    seed: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    num_steps: int | None = None
    solver: Solver = "adams2"
    prefix_codes: Sequence[int] | Tensor = ()
    num_groups: int | None = None
    noise_seed: int | None = None
    output: Output = "image"
    previews: bool = False
    priority: int = 0
    deadline: float | None = None
    best_of: BestOf | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a checked request asks of the lanes: one candidate, nothing left open."""

    label: int
    seed: int
    noise_seed: int
    guidance: tuple[float, ...]  # [N]
    temperatures: tuple[float, ...]  # [N]
    top_k: int
    top_p: float
    guided: bool
    prefix: tuple[int, ...]
    groups: int  # G
    steps: int  # that can be taken with the codes of G groups; 0 with output "codes"
    num_steps: int  # S
    solver: Solver
    early: bool  # G < K: the picture is the last step's estimate
    reads: tuple[int, ...]  # groups that must be drawn before step i = 0 … steps - 1

    @property
    def row_count(self) -> int:
        """Rows of the prior's batch: one, and with guidance the null class."""
        return 2 if self.guided else 1


def _prefix(codes: Sequence[int] | Tensor, config: TokenizerConfig) -> tuple[int, ...]:
    if isinstance(codes, Tensor):
        if codes.ndim != 1 or codes.is_floating_point() or codes.dtype == torch.bool:
            raise ValueError(
                f"prefix_codes: expected integers [P], got {codes.dtype} {list(codes.shape)}"
            )
        codes = codes.tolist()
    if not isinstance(codes, Sequence) or isinstance(codes, str):
        raise TypeError(f"prefix_codes: expected integers, got {type(codes).__name__}")
    if len(codes) > config.num_tokens:
        raise ValueError(
            f"prefix_codes: expected at most {config.num_tokens} codes, got {len(codes)}"
        )
    return tuple(check_integer("prefix_codes", c, 0, config.codebook_size - 1) for c in codes)


def _check_best_of(best: BestOf, groups: int, output: str, scorers: Sequence[str]) -> None:
    if not isinstance(best, BestOf):
        raise TypeError(f"best_of: expected a BestOf, got {type(best).__name__}")
    check_integer("best_of.count", best.count, 2, 2**16)
    if output != "image":
        raise ValueError(
            f"best_of: expected output 'image', whose previews it scores, got {output!r}"
        )
    if groups < 2:
        raise ValueError(f"best_of: expected at least 2 groups to draw, got {groups}")
    check_integer("best_of.groups", best.groups, 1, groups - 1)
    if isinstance(best.scorer, str):
        if best.scorer not in scorers:
            raise ValueError(
                f"best_of.scorer: expected a callable or one of {list(scorers)}, "
                f"got {best.scorer!r}"
            )
    elif not callable(best.scorer):
        raise TypeError(
            f"best_of.scorer: expected a callable or a name, got {type(best.scorer).__name__}"
        )


def check_request(
    request: GenerationRequest,
    prior: PriorConfig,
    tokenizer: TokenizerConfig,
    scorers: Sequence[str] = (),
) -> list[Plan]:
    """The plans of a request, one a candidate.

    Raises:
        TypeError: where a field has a wrong type.
        ValueError: where one is out of its range: "name: expected …, got …".
    """
    if not isinstance(request, GenerationRequest):
        raise TypeError(f"request: expected a GenerationRequest, got {type(request).__name__}")
    K, N, Q = tokenizer.num_groups, tokenizer.num_tokens, tokenizer.group_size
    label = check_integer("label", request.label, 0, prior.num_classes - 1)
    if not isinstance(request.sampling, Sampling):
        raise TypeError(f"sampling: expected a Sampling, got {type(request.sampling).__name__}")
    request.sampling.check_groups(K)
    request.sampling.check_groups(K)
    if not isinstance(request.previews, bool):
        raise TypeError(f"previews: expected a bool, got {request.previews!r}")
    S = tokenizer.num_steps
    if request.num_steps is not None:
        S = check_integer("num_steps", request.num_steps, 1, MAX_STEPS)
    check_choice("solver", request.solver, SOLVERS)
    check_choice("output", request.output, OUTPUTS)
    groups = K
    if request.num_groups is not None:
        groups = check_integer("num_groups", request.num_groups, 1, K)
    prefix = _prefix(request.prefix_codes, tokenizer)[: groups * Q]
    check_integer("priority", request.priority, -(2**31), 2**31)
    late = request.deadline
    if late is not None and (
        isinstance(late, bool) or not isinstance(late, int | float) or not late > 0
    ):
        raise ValueError(f"deadline: expected seconds > 0, got {late!r}")
    count = 1
    if request.best_of is not None:
        _check_best_of(request.best_of, groups, request.output, scorers)
        count = request.best_of.count
    if request.seed is not None:
        check_integer("seed", request.seed, 0, MAX_SEED - count + 1)
    seeds = resolve_seeds(request.seed, count)
    noise = request.noise_seed
    if noise is not None:
        check_integer("noise_seed", noise, 0, MAX_SEED)
    sampling = request.sampling
    guidance = tuple(sampling.scales(N).tolist())
    reads = tuple(group_start(i, S, K, N) // Q + 1 for i in range(S))
    steps = sum(r <= groups for r in reads) if request.output == "image" else 0
    return [
        Plan(
            label=label, seed=seed, noise_seed=seed if noise is None else noise,
            guidance=guidance, temperatures=tuple(sampling.temperatures(N).tolist()),
            top_k=sampling.top_k, top_p=sampling.top_p,
            guided=sampling.guided(N, len(prefix)), prefix=prefix, groups=groups, steps=steps,
            num_steps=S, solver=request.solver, early=groups < K, reads=reads[:steps],
        )
        for seed in seeds
    ]  # fmt: skip


__all__ = [
    "BestOf", "Candidates", "GenerationRequest", "Output", "Plan", "Scorer", "check_request",
]  # fmt: skip
