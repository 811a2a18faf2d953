"""Official files to our folders and back; weights keep their values, unless to be quantised."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dar_fast.checkpoint.folder import (
    CONFIG,
    MAX_SHARD_BYTES,
    load_model,
    read_json,
    save_model,
    write_safetensors,
)
from dar_fast.checkpoint.official import load_state, resolve, to_official
from dar_fast.checkpoint.official_config import official_config
from dar_fast.checkpoint.official_state import read_official
from dar_fast.checkpoint.pipeline_folder import PIPELINE_INDEX, check_parts, save_parts
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.files import atomic_write
from dar_fast.models import Prior, Tokenizer
from dar_fast.quantization import Quantization, quantization_dtype, quantize_prior

Form = Literal["ours", "official"]
FORMS = ("ours", "official")
Config = PriorConfig | TokenizerConfig | Mapping[str, Any]
PathLike = str | os.PathLike[str]


def convert(
    source: PathLike | Iterable[PathLike],
    target: PathLike,
    to: Form = "ours",
    *,
    config: Config | None = None,
    image_size: int | None = None,
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Convert one model, or a prior and a tokenizer, and return the files written.

    Args:
        source: official files (`.pt`, official-named `.safetensors`), component folders or a
            pipeline folder; one path or several.
        target: to "ours": a component folder for one model, a pipeline folder for both. To
            "official": a `.pt` or `.safetensors` file for one, a folder of two `.pt` for both.
        config: ours or official, for one official source that does not hold its own.
        image_size: R of an official tokenizer, which its own configuration does not say.
        dtype: of the weights written; None: as stored. A prior in one byte keeps its products so
            in our folders; an official file gets what they stand for.
        quantize: "int8" or "fp8": the prior's products, from the values as stored.
        max_shard_bytes: of one component folder's files.

    Raises:
        CheckpointError: where a source cannot be read or does not fit.
        ValueError: where the arguments do not fit each other.
        OSError: where the target cannot be written.
    """
    if to not in FORMS:
        raise ValueError(f"to: expected one of {list(FORMS)}, got {to!r}")
    if quantize is not None:
        quantization_dtype(quantize)
        if to == "official":
            raise ValueError(
                f"quantize: expected to='ours', got {to!r}, which has no weights in one byte"
            )
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    sources = [part for path in paths for part in _parts(Path(path))]
    if not 1 <= len(sources) <= 2 or (config is not None and len(sources) > 1):
        raise ValueError(
            f"source: expected {'one model' if config is not None else 'one or two models'}, "
            f"got {len(sources)}"
        )
    modules = [
        _load(path, config, image_size, None if quantize is not None else dtype) for path in sources
    ]
    if quantize is not None:
        _quantize(modules, quantize, dtype)
    target = Path(target)
    if len(modules) == 1:
        if to == "ours":
            return save_model(modules[0], target, max_shard_bytes=max_shard_bytes)
        return [_write_official(modules[0], target)]
    prior = next((m for m in modules if isinstance(m, Prior)), None)
    tokenizer = next((m for m in modules if isinstance(m, Tokenizer)), None)
    if prior is None or tokenizer is None:
        raise ValueError("source: expected a prior and a tokenizer, got two of one kind")
    if to == "official":
        if target.suffix in (".pt", ".safetensors"):
            raise ValueError(f"target: expected a folder for two models, got {target}")
        target.mkdir(parents=True, exist_ok=True)
        return [
            _write_official(module, target / f"{name}.pt")
            for name, module in (("prior", prior), ("tokenizer", tokenizer))
        ]
    labels = list(check_parts(prior, tokenizer, _labels(paths)))
    save_parts(target, prior, tokenizer, labels)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _parts(path: Path) -> list[Path]:
    if (path / PIPELINE_INDEX).is_file():
        return [path / "prior", path / "tokenizer"]
    return [path]


def _load(
    path: Path, config: Config | None, image_size: int | None, dtype: torch.dtype | None
) -> Prior | Tokenizer:
    if path.is_dir():
        if config is not None or image_size is not None:
            raise ValueError(f"config: expected none for {path}, whose {CONFIG} says it")
        return load_model(path, dtype=dtype)
    state = read_official(path)
    component = resolve(path, state, state.kind, config, image_size)
    return load_state(path, state, state.kind, component, dtype)


def _quantize(
    modules: list[Prior | Tokenizer], quantization: Quantization, dtype: torch.dtype | None
) -> None:
    """The bytes come from the weights as stored, before these are cast."""
    priors = [module for module in modules if isinstance(module, Prior)]
    if not priors:
        raise ValueError("quantize: expected a prior in the source, got a tokenizer alone")
    for prior in priors:
        quantize_prior(prior, quantization)
    for module in modules:
        module.to(dtype=dtype)


def _labels(paths: list[PathLike]) -> list[str] | None:
    for path in paths:
        index = Path(path) / PIPELINE_INDEX
        if index.is_file():
            labels = read_json(index).get("labels")
            return labels if isinstance(labels, list) else None
    return None


def _write_official(module: Prior | Tokenizer, target: Path) -> Path:
    if target.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"target: expected a .pt or .safetensors file, got {target}")
    target.parent.mkdir(parents=True, exist_ok=True)
    config = official_config(module.config)
    tensors = {name: _compact(tensor) for name, tensor in to_official(module).items()}
    if target.suffix == ".safetensors":
        write_safetensors(target, tensors, {"config": json.dumps(config)})
        return target
    with atomic_write(target) as temporary:
        try:
            torch.save({"model": tensors, "config": config}, temporary)
        except RuntimeError as error:  # the zip writer's own failure to write
            raise OSError(f"{target}: cannot be written ({error})") from error
    return target


def _compact(tensor: Tensor) -> Tensor:
    """Contiguous, and alone in its storage: torch.save writes storages whole."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


__all__ = ["convert"]
