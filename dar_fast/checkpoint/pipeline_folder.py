"""The folder of a pipeline: model_index.json beside prior/ and tokenizer/, diffusers-style.

It is written under another name beside its place and moved in when complete.
"""

import importlib.resources
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

import dar_fast
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.folder import load_model, save_model
from dar_fast.labels import label_table
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.pair import check_pair

PIPELINE_INDEX = "model_index.json"
DEMO = "demo"
CLASS_NAME = "DARPipeline"
MAX_INDEX_BYTES = 8 << 20  # a million label names


T = TypeVar("T")


class PipelineParts(NamedTuple):
    prior: Prior
    tokenizer: Tokenizer
    labels: list[str]  # empty: no names


def check_parts(
    prior: Prior, tokenizer: Tokenizer, labels: Sequence[str] | Mapping[str, int] | None
) -> dict[str, int]:
    """The table of labels of parts that fit each other.

    Raises:
        TypeError, ValueError: where they do not.
    """
    check_pair(prior, tokenizer)
    return label_table(labels, prior.config.num_classes)


def pick_dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; by default fp32 on the CPU, bf16 elsewhere.

    Raises:
        TypeError: where it is not a torch.dtype.
        ValueError: where it is not floating point.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__} {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point dtype, got {dtype}")
    return dtype


def _read_index(folder: Path) -> list[str]:
    """Label names of a pipeline folder."""
    path = folder / PIPELINE_INDEX
    try:
        with path.open("rb") as file:
            text = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: expected a pipeline folder with {PIPELINE_INDEX}, prior/ and tokenizer/, "
            f"got no readable {PIPELINE_INDEX} ({error.strerror})"
        ) from error
    if len(text) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_INDEX_BYTES} bytes, got more")
    try:
        index: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got an unreadable file ({error})") from error
    if not isinstance(index, dict) or index.get("_class_name") != CLASS_NAME:
        name = index.get("_class_name") if isinstance(index, dict) else type(index).__name__
        raise CheckpointError(f"{path}: expected _class_name {CLASS_NAME!r}, got {name!r}")
    labels = index.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise CheckpointError(f"{path}: expected labels to be a list of names, got something else")
    return labels


def _load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> PipelineParts:
    labels = _read_index(folder)

    def part(name: str, kind: type[T]) -> T:
        module = load_model(folder / name, device, dtype)
        if not isinstance(module, kind):
            raise CheckpointError(
                f"{folder / name}: expected a {kind.__name__}, got a {type(module).__name__}"
            )
        return module

    return PipelineParts(part("prior", Prior), part("tokenizer", Tokenizer), labels)


def load_parts(
    path: str | os.PathLike[str], device: torch.device, dtype: torch.dtype
) -> PipelineParts:
    """Read a pipeline folder, or the embedded model where `path` is "demo".

    Raises:
        CheckpointError: where it is missing, incomplete or corrupt.
        TypeError: where `path` is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected a folder or 'demo', got {type(path).__name__}")
    if path != DEMO:
        return _load_folder(Path(path), device, dtype)
    assets = importlib.resources.files("dar_fast").joinpath("assets", DEMO)
    if not assets.joinpath(PIPELINE_INDEX).is_file():
        raise CheckpointError(
            "demo: expected the embedded model in dar_fast/assets/demo, got none: this copy of "
            "dar_fast was built without it; pass a folder that save_pretrained wrote"
        )
    with importlib.resources.as_file(assets) as folder:
        return _load_folder(folder, device, dtype)


def save_parts(
    path: str | os.PathLike[str], prior: Prior, tokenizer: Tokenizer, labels: list[str]
) -> None:
    """Write a pipeline folder; an earlier one there is replaced once the new one is complete.

    Raises:
        OSError: where the folder cannot be written, or the disk is full.
    """
    target = Path(path)
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as name:
            _write_parts(Path(name), prior, tokenizer, labels)
            _move_parts(Path(name), target)
    except BaseException:
        if new and not any(target.iterdir()):
            target.rmdir()
        raise


def _write_parts(work: Path, prior: Prior, tokenizer: Tokenizer, labels: list[str]) -> None:
    for part, module in (("prior", prior), ("tokenizer", tokenizer)):
        save_model(module, work / part)
    index = {
        "_class_name": CLASS_NAME,
        "_dar_fast_version": dar_fast.__version__,
        "prior": ["dar_fast.models", "Prior"],
        "tokenizer": ["dar_fast.models", "Tokenizer"],
        "labels": labels,
    }
    (work / PIPELINE_INDEX).write_text(
        json.dumps(index, indent=2, ensure_ascii=False) + "\n", "utf-8"
    )


def _move_parts(work: Path, target: Path) -> None:
    (target / PIPELINE_INDEX).unlink(missing_ok=True)  # no pipeline while its parts change
    for part in ("prior", "tokenizer"):
        if (target / part).exists():
            (target / part).rename(work / f"old-{part}")
        (work / part).rename(target / part)
    (work / PIPELINE_INDEX).rename(target / PIPELINE_INDEX)


__all__ = [
    "PIPELINE_INDEX", "PipelineParts", "check_parts", "load_parts", "pick_dtype",
    "save_parts",
]  # fmt: skip
