"""The trained parts in the released format: bf16 safetensors and JSON, in small files."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dar_fast import DARPipeline
from dar_fast.checkpoint import load_model, save_model
from dar_fast.models import Prior, Tokenizer
from dar_train.reporting import logger

MAX_FILE_BYTES = 15 << 20  # a machine that trains may hand back files of up to 16 MiB only


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRecipe:
    """Which trained parts become one pipeline."""

    tokenizer: Path = Path("runs/tokenizer/tokenizer")  # folder of the trained tokenizer
    prior: Path = Path("runs/prior/prior")  # folder of the trained prior
    labels: Path | None = None  # JSON list of names; labels.json beside the prior by default
    out: Path = Path("runs/pipeline")  # folder of the pipeline


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def export_component(module: nn.Module, folder: Path) -> Path:
    """Write `module` in bf16 as one component folder and return it."""
    weights = copy.deepcopy(module).to(torch.bfloat16).cpu()
    save_model(weights, folder, max_shard_bytes=MAX_FILE_BYTES)
    logger.info("wrote %s, %.1f MB", folder, _size(folder))
    return folder


def _label_names(file: Path) -> list[str]:
    try:
        names = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"labels: expected a JSON list of names in {file}, got {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"labels: expected a JSON list of names in {file}, got something else")
    return names


def export_pipeline(recipe: ExportRecipe) -> Path:
    """Join a tokenizer, a prior and label names into a folder for `DARPipeline.from_pretrained`.

    Raises:
        ValueError: where a part is of the wrong kind, or the parts do not fit each other.
        CheckpointError: where a part cannot be read.
    """
    names = _label_names(recipe.labels or recipe.prior.parent / "labels.json")
    prior = load_model(recipe.prior, dtype=torch.bfloat16)
    tokenizer = load_model(recipe.tokenizer, dtype=torch.bfloat16)
    if not isinstance(prior, Prior) or not isinstance(tokenizer, Tokenizer):
        raise ValueError(
            f"export: expected a prior and a tokenizer, got {type(prior).__name__} and "
            f"{type(tokenizer).__name__}"
        )
    DARPipeline(prior, tokenizer, names).save_pretrained(recipe.out)
    logger.info("wrote %s, %.1f MB", recipe.out, _size(recipe.out))
    return recipe.out
