"""What one byte a weight costs a prior: its next codes and its pictures beside those of bf16.

KL(p‖q) = Σ p ln(p/q) in nats, p of the weights in bf16 and q of the same weights in int8 or fp8,
both in the arithmetic of the module (fp32 shows the weights alone), over codes that are given:
2·B·N tokens through the prior twice. Codes drawn freely part at the first that differs, and their
pictures with them: so pictures are compared beside the share whose codes are equal.
"""

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_fast.images import to_unit
from dar_fast.models import Prior, Tokenizer
from dar_fast.pipeline import DARPipeline
from dar_fast.quantization import Quantization, products, quantize_prior, stored_quantization
from dar_fast.sampling import GuidanceScale, Sampling

MAX_LOGITS = 1 << 24  # at once: 128 MiB in fp64
MAX_PICTURES = 16  # decoded at once


class NextCodes(NamedTuple):
    """How two priors differ in the codes that they expect next, over B N given codes."""

    mean_kl: float  # nats a code
    max_kl: float
    agreement: float  # share of positions whose likeliest code is the same


class Runs(NamedTuple):
    """How the codes and pictures differ that two priors draw with the same seeds."""

    equal_prefix: float  # mean number of codes before the first that differs, at most N
    equal_codes: float  # share of pictures with all N equal
    psnr_db: float | None  # of the mean square error over all pictures; None: no pixel differs


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationReport:
    """A prior in one byte beside itself in bf16."""

    quantization: Quantization
    num_samples: int
    seed: int
    guidance_scale: GuidanceScale
    num_tokens: int  # N
    bytes: int  # of all weights of the prior
    reference_bytes: int  # in bf16
    next_codes: NextCodes
    greedy: Runs
    sampled: Runs

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        for name in ("next_codes", "greedy", "sampled"):
            values[name] = getattr(self, name)._asdict()
        return values


def _guided_logits(prior: Prior, codes: Tensor, labels: Tensor, scales: Tensor) -> Tensor:
    """Logits `[B, N, V]` fp64 that code p is drawn from, given those before it."""
    logits = prior(codes, labels).double()
    if bool((scales > 1).any()):
        null = prior(codes, torch.full_like(labels, prior.config.null_class)).double()
        s = scales.to(logits)[:, None]
        logits = torch.where(s > 1, null + s * (logits - null), logits)
    return logits


@torch.no_grad()
def compare_next_codes(
    reference: Prior,
    candidate: Prior,
    codes: Tensor,
    labels: Tensor,
    *,
    guidance_scale: GuidanceScale = 4.0,
) -> NextCodes:
    """Distributions of each code given the codes before it, of two priors of one shape.

    Args:
        reference: p of KL(p‖q), in evaluation mode.
        candidate: q.
        codes: int64 `[B, N]`, such as ones that the reference drew; B ≥ 1.
        labels: int64 `[B]`.
        guidance_scale: of the distributions, as in drawing; 1: the model's own.

    Raises:
        ValueError: where the priors, a shape or a range do not fit.
    """
    config = reference.config
    if candidate.config != config:
        raise ValueError(f"candidate: expected a prior of {config}, got {candidate.config}")
    if not codes.numel():
        raise ValueError(f"codes: expected int64 [B, N] with B >= 1, got {list(codes.shape)}")
    scales = Sampling(guidance_scale=guidance_scale).scales(config.num_tokens)[: codes.shape[1]]
    rows = max(1, MAX_LOGITS // (codes.shape[1] * config.vocab_size))
    divergences, same = [], []
    for some, of in zip(torch.split(codes, rows), torch.split(labels, rows), strict=True):
        some, of = some.to(reference.device), of.to(reference.device)
        p, q = (
            F.log_softmax(_guided_logits(m, some, of, scales), -1) for m in (reference, candidate)
        )
        divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0))  # rounding may go below
        same.append(p.argmax(-1) == q.argmax(-1))
    kl, agreement = torch.cat(divergences), torch.cat(same).double().mean()
    return NextCodes(float(kl.mean()), float(kl.max()), float(agreement))


@torch.no_grad()
def compare_runs(tokenizer: Tokenizer, codes: Tensor, others: Tensor, seeds: list[int]) -> Runs:
    """Codes `[B, N]` of two priors, and what they decode to from the same noise.

    Raises:
        ValueError: where the shapes differ or a code is out of range.
    """
    if codes.shape != others.shape:
        raise ValueError(f"others: expected {list(codes.shape)}, got {list(others.shape)}")
    equal = codes == others
    prefix = equal.long().cumprod(1).sum(1)
    parted = (~equal.all(1)).nonzero().flatten().tolist()
    error = 0.0
    for start in range(0, len(parted), MAX_PICTURES):
        rows = parted[start : start + MAX_PICTURES]
        their_seeds = [seeds[i] for i in rows]
        a, b = (to_unit(tokenizer.decode(c[rows], seeds=their_seeds)) for c in (codes, others))
        error += float((a.double() - b.double()).square().mean((1, 2, 3)).sum())
    error /= len(codes)
    return Runs(
        float(prefix.double().mean()),
        1 - len(parted) / len(codes),
        -10 * math.log10(error) if error else None,
    )


def compare_quantized(
    pipeline: DARPipeline,
    quantization: Quantization,
    *,
    num_samples: int = 16,
    seed: int = 0,
    guidance_scale: GuidanceScale = 4.0,
) -> QuantizationReport:
    """The prior of `pipeline`, which stays as it is, in one byte a weight beside bf16.

    Pictures are of classes drawn with `seed`, and of the seeds from it on. The given codes are
    those that the reference draws at temperature 1.

    Raises:
        TypeError, ValueError: where an argument does not fit, or the prior is in one byte already.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name}: expected an integer >= {least}, got {value}")
    stored = stored_quantization(pipeline.prior)
    if stored is not None:
        raise ValueError(
            f"prior: expected weights before they were quantised, to compare with, got {stored!r}"
        )
    dtype = pipeline.prior.head.weight.dtype
    candidate = copy.deepcopy(pipeline.prior)
    quantize_prior(candidate, quantization)
    reference = copy.deepcopy(pipeline.prior).to(torch.bfloat16).to(dtype)
    config = reference.config
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(config.num_classes, (num_samples,), generator=generator)
    seeds = list(range(seed, seed + num_samples))

    def draw(prior: Prior, temperature: float) -> Tensor:
        return prior.generate(
            labels, guidance_scale=guidance_scale, temperature=temperature, seeds=seeds
        )

    sampled, greedy = draw(reference, 1.0), draw(reference, 0.0)
    return QuantizationReport(
        quantization=quantization,
        num_samples=num_samples,
        seed=seed,
        guidance_scale=guidance_scale,
        num_tokens=config.num_tokens,
        bytes=_bytes(candidate),
        reference_bytes=_bytes(reference),
        next_codes=compare_next_codes(
            reference, candidate, sampled, labels, guidance_scale=guidance_scale
        ),
        greedy=compare_runs(pipeline.tokenizer, greedy, draw(candidate, 0.0), seeds),
        sampled=compare_runs(pipeline.tokenizer, sampled, draw(candidate, 1.0), seeds),
    )


def _bytes(prior: Prior) -> int:
    """Of the weights, those in one byte with their scales, all others in bf16."""
    total = 2 * sum(parameter.numel() for parameter in prior.parameters())
    for product in products(prior).values():
        if product.quantized is not None:
            total += sum(p.nbytes for p in product.quantized) - 2 * product.weight.numel()
    return total


def quality_report(
    pipeline: DARPipeline,
    quantization: Quantization,
    num_samples: int = 16,
    seed: int = 0,
    guidance_scale: GuidanceScale = 4.0,
) -> dict[str, Any]:
    """`compare_quantized` as JSON values."""
    return compare_quantized(
        pipeline, quantization, num_samples=num_samples, seed=seed, guidance_scale=guidance_scale
    ).to_dict()


__all__ = [
    "NextCodes", "QuantizationReport", "Runs", "compare_next_codes", "compare_quantized",
    "compare_runs", "quality_report",
]  # fmt: skip
