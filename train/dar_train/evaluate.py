"""The honest report of a pipeline on held-out pictures: JSON and the figures of its model card.

Costs one encoding and one decoding of every held-out picture, one prior pass over their codes,
and as many samples as asked for.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dar_fast import DARPipeline
from dar_fast.device import pick_device
from dar_fast.files import atomic_write
from dar_train import figures
from dar_train.classifier import Classifier, split_label
from dar_train.codebook import use_of
from dar_train.data import Pictures, chunks, load_pictures, to_float
from dar_train.reporting import logger
from dar_train.runs import describe_run, machine
from dar_train.tokens import unigram

CHUNK = 64
GRID_ROWS = 12
COMPONENTS, ROUNDS = 64, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe:
    """What to evaluate on what.

    Raises:
        ValueError: where a number is out of its range.
    """

    pipeline: str = "runs/pipeline"  # a pipeline folder, or demo
    data: Path = Path("emoji-32.npz")  # the data set it was trained on
    classifier: Path | None = None  # folder of a trained classifier; without one, no accuracies
    out: Path = Path("runs/report")  # folder for report.json and pictures
    samples: int = 768  # pictures to sample, their labels as held-out pictures have them
    guidance: float = 4.0  # guidance scale of the samples
    top_p: float = 1.0  # probability mass kept while sampling
    temperature: float = 1.0  # of the sampling
    seed: int = 0  # of the samples
    device: str = "auto"  # auto, cpu, cuda or cuda:<n>
    threads: int | None = None  # CPU threads; the machine's own choice by default
    runs: tuple[Path, ...] = ()  # folders of the trainings, whose curves and calls to report

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples: expected a number >= 0, got {self.samples}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads: expected a positive number, got {self.threads}")


def _reconstruct(pipe: DARPipeline, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Codes, and the estimate after every step followed by the picture, all on the CPU."""
    codes, steps = [], []
    for start, part in zip(range(0, len(images), CHUNK), chunks(images, CHUNK), strict=False):
        code = pipe.tokenizer.encode(part.to(pipe.device))
        seen = figures.previews(pipe.tokenizer, code, list(range(start, start + len(part))))
        codes.append(code.cpu())
        steps.append(torch.stack([x.float().cpu() for x in seen]))
    return torch.cat(codes), list(torch.cat(steps, dim=1))


def _tokenizer_report(
    pipe: DARPipeline, data: Pictures, images: Tensor, codes: Tensor, steps: list[Tensor]
) -> dict[str, Any]:
    config = pipe.tokenizer.config
    psnr = figures.psnr(images, steps[-1])
    styles = [split_label(data.label_names[i])[0] for i in data.labels[data.held_out].tolist()]
    by_style = {
        style: float(psnr[torch.tensor([s == style for s in styles])].mean())
        for style in sorted(set(styles))
    }
    by_groups = []
    for step, estimate in enumerate(steps[:-1]):
        tokens = pipe.tokenizer.group_start(step, config.num_steps) + config.group_size
        by_groups.append(
            {
                "step": step + 1,
                "groups": -(-tokens // config.group_size),
                "psnr": float(figures.psnr(images, estimate).mean()),
                "psnr_of_mean": figures.psnr_of_mean(images, estimate),
            }
        )
    return {
        "psnr": float(psnr.mean()),
        "psnr_median": float(psnr.median()),
        "psnr_of_mean": figures.psnr_of_mean(images, steps[-1]),
        "psnr_by_style": by_style,
        "previews": by_groups,
        "codes_held_out": use_of(torch.bincount(codes.flatten(), minlength=config.codebook_size)),
    }


def baselines(train: Tensor, held_out: Tensor) -> dict[str, dict[str, float]]:
    """PSNR of the mean training picture, and of its 64 principal components, not quantised.

    As many numbers a picture as the demo has codes, so what codes cannot lose more than.
    """
    rows, wanted = train.flatten(1), held_out.flatten(1)
    mean = rows.mean(dim=0)
    rows = rows - mean
    axes = torch.randn(rows.shape[1], 2 * COMPONENTS, generator=torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):  # of subspace iteration: 4·M·D·128 multiplications each
        axes = torch.linalg.qr(rows.T @ (rows @ axes)).Q
    axes = axes @ torch.linalg.svd(rows @ axes, full_matrices=False).Vh[:COMPONENTS].T
    projected = mean + (wanted - mean) @ axes @ axes.T
    seen = {"mean": mean.expand_as(wanted), "components": projected}
    return {
        name: {
            "psnr": float(figures.psnr(held_out, x.view_as(held_out)).mean()),
            "psnr_of_mean": figures.psnr_of_mean(held_out, x.view_as(held_out)),
        }
        for name, x in seen.items()
    }


def _models(pipe: DARPipeline) -> dict[str, Any]:
    """What the parts are: sizes, codes, groups, steps, labels."""
    config = pipe.tokenizer.config
    return {
        "tokenizer_parameters": sum(p.numel() for p in pipe.tokenizer.parameters()),
        "prior_parameters": sum(p.numel() for p in pipe.prior.parameters()),
        "image_size": config.image_size,
        "num_tokens": config.num_tokens,
        "num_groups": config.num_groups,
        "num_steps": config.num_steps,
        "codebook_size": config.codebook_size,
        "labels": len(pipe.labels),
    }


@torch.no_grad()
def _cross_entropy(pipe: DARPipeline, codes: Tensor, labels: Tensor) -> float:
    total = 0.0
    for code, label in zip(chunks(codes, CHUNK), chunks(labels, CHUNK), strict=True):
        code = code.to(pipe.device)
        total += float(pipe.prior.loss(code, label.to(pipe.device), reduction="sum"))
    return total / codes.numel()


def _sample(pipe: DARPipeline, recipe: EvaluateRecipe, labels: Tensor) -> Tensor:
    """Pictures [M, 3, R, R] in [-1, 1] of `labels`, a seed each."""
    parts = []
    for i, part in enumerate(chunks(labels, CHUNK)):
        first = recipe.seed + i * CHUNK
        out = pipe(
            part, seeds=list(range(first, first + len(part))), guidance_scale=recipe.guidance,
            top_p=recipe.top_p, temperature=recipe.temperature, output_type="pt",
        )  # fmt: skip
        if isinstance(out.images, Tensor):
            parts.append(out.images.float().cpu() * 2 - 1)
        logger.info("sampled %d of %d", min(len(labels), (i + 1) * CHUNK), len(labels))
    return torch.cat(parts)


def evaluate(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Write report.json and figures to `recipe.out`; returns the report.

    Raises:
        ValueError: where data, pipeline and classifier do not fit each other.
        CheckpointError: where the pipeline cannot be read.
    """
    device = pick_device(None if recipe.device == "auto" else recipe.device)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    pipe = DARPipeline.from_pretrained(recipe.pipeline, device=device)
    data = load_pictures(recipe.data, pipe.tokenizer.config.image_size)
    if list(pipe.labels) != data.label_names:
        raise ValueError("data: expected the labels that the pipeline was trained on, got others")
    recipe.out.mkdir(parents=True, exist_ok=True)
    images, labels = to_float(data.images[data.held_out]), data.labels[data.held_out]
    codes, steps = _reconstruct(pipe, images)
    train_images = to_float(data.images[data.train])
    train_codes = torch.cat(
        [pipe.tokenizer.encode(part.to(device)).cpu() for part in chunks(train_images, CHUNK)]
    )
    vocab = pipe.tokenizer.config.codebook_size
    counts = torch.bincount(train_codes.flatten(), minlength=vocab)
    report: dict[str, Any] = {
        "pictures": {
            "train": len(data.train),
            "held_out": len(data.held_out),
            "held_out_names": len({data.names[i] for i in data.held_out.tolist()}),
            "styles": sorted({split_label(name)[0] for name in data.label_names}),
        },
        "models": _models(pipe),
        "baselines": baselines(train_images, images),
        "tokenizer": _tokenizer_report(pipe, data, images, codes, steps)
        | {"codes_train": use_of(counts)},
        "prior": {
            "cross_entropy": _cross_entropy(pipe, codes, labels),
            "cross_entropy_train": _cross_entropy(
                pipe, train_codes[: len(codes)], data.labels[data.train][: len(codes)]
            ),
            **unigram(train_codes, codes, vocab),
        },
        "settings": {
            "guidance": recipe.guidance, "top_p": recipe.top_p,
            "temperature": recipe.temperature, "seed": recipe.seed, "samples": recipe.samples,
        },
        "machine": machine(device),
        "runs": [describe_run(run) for run in recipe.runs],
    }  # fmt: skip
    rows = torch.linspace(0, len(images) - 1, min(GRID_ROWS, len(images))).long()
    grid = torch.stack([images[rows], *(step[rows] for step in steps)], dim=1)
    figures.save_grid(grid, recipe.out / "reconstructions.png")
    if recipe.samples:
        chosen = torch.arange(recipe.samples) * len(labels) // recipe.samples
        asked = labels[chosen]
        samples = _sample(pipe, recipe, asked)
        side = max(1, min(8, int(len(samples) ** 0.5)))
        shown = torch.linspace(0, len(samples) - 1, side * side).long()
        figures.save_grid(
            samples[shown].reshape(side, side, *samples.shape[1:]), recipe.out / "samples.png"
        )
        if recipe.classifier is not None:
            judge = _load_judge(recipe.classifier, device, data)
            report["classifier"] = {
                "held_out": judge.accuracy(images, labels),
                "reconstructions": judge.accuracy(steps[-1], labels),
                "samples": judge.accuracy(samples, asked),
            }
    _draw(recipe, report)
    with atomic_write(recipe.out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    logger.info("wrote %s", recipe.out / "report.json")
    return report


def _load_judge(folder: Path, device: torch.device, data: Pictures) -> Classifier:
    judge = Classifier.load(folder).to(device)
    if judge.label_names != data.label_names:
        raise ValueError(f"classifier: expected one of these labels in {folder}, got another's")
    if judge.size != data.images.shape[-1]:
        raise ValueError(
            f"classifier: expected one of {data.images.shape[-1]} pixels in {folder}, "
            f"got {judge.size}"
        )
    return judge


def _draw(recipe: EvaluateRecipe, report: dict[str, Any]) -> None:
    from dar_train import curves

    curves.draw_previews(report["tokenizer"]["previews"], recipe.out / "previews.png")
    for run in recipe.runs:
        curves.draw_metrics(run / "metrics.jsonl", recipe.out / f"curves-{run.name}.png")
