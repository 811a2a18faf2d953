"""Our format: a folder with config.json and safetensors weights, in shards where they are large.

    config.json                     "_class", "_weights" (the next file) and the configuration;
                                    of a prior in one byte "quantization": quantized_state.py
    model.safetensors               or
    model.safetensors.index.json    with model-00001-of-0000N.safetensors

Loading builds the module without memory (meta device) and assigns the tensors: it costs reading the
weights once. Saving never leaves half a model: a new folder is renamed into place, and in an
existing one every file is replaced whole, config.json last.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import dar_fast
from dar_fast.checkpoint.assemble import Component, build
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.quantized_state import stored_state
from dar_fast.checkpoint.safetensors_file import read_safetensors
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.files import atomic_write
from dar_fast.models import Prior, Tokenizer
from dar_fast.quantization import Quantization, quantization_dtype, stored_quantization

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
MAX_JSON_BYTES = 16 << 20
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_model(
    module: nn.Module, folder: str | os.PathLike[str], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write a Prior or a Tokenizer to `folder` and return its files; the weights keep their dtype.

    A prior that `quantize_prior` or its folder made is written in one byte, as it is.

    Args:
        max_shard_bytes: weights above this are split into files of at most this size, or of one
            tensor.

    Raises:
        TypeError: where `module` is neither.
        ValueError: where `max_shard_bytes` is not positive.
        OSError: where the folder cannot be written, or the disk is full.
    """
    if not isinstance(module, Prior | Tokenizer):
        raise TypeError(f"module: expected a Prior or a Tokenizer, got {type(module).__name__}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected an integer >= 1, got {max_shard_bytes}")
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return _write(module, target, max_shard_bytes)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        work = Path(name) / "new"
        work.mkdir()
        names = [path.name for path in _write(module, work, max_shard_bytes)]
        work.rename(target)
    return [target / name for name in names]


def _write(module: Prior | Tokenizer, folder: Path, max_shard_bytes: int) -> list[Path]:
    tensors = {k: v.detach().cpu().contiguous() for k, v in stored_state(module).items()}
    shards = _shards(tensors, max_shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {})
    if len(shards) > 1:
        total = sum(v.nbytes for v in tensors.values())
        where = {k: name for name, shard in zip(names, shards, strict=True) for k in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        names.append(INDEX)
    config = {
        "_class": type(module).__name__,
        "_dar_fast_version": dar_fast.__version__,
        "_weights": names[-1],
        **module.config.to_dict(),
    }
    if isinstance(module, Prior) and (quantization := stored_quantization(module)) is not None:
        config["quantization"] = quantization
    _write_json(folder / CONFIG, config)
    names.append(CONFIG)
    for path in folder.iterdir():  # what an earlier model left
        stale = path.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(path.name)
        if stale and path.name not in names:
            path.unlink()
    return [folder / name for name in names]


def _shards(tensors: dict[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `path` whole or not at all.

    Raises:
        OSError: where it cannot be written, or the disk is full.
    """
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", **metadata})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def load_model(
    folder: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Prior | Tokenizer:
    """The model that `save_model` wrote, in evaluation mode.

    Args:
        device: where to; None: the CPU.
        dtype: of the floating-point weights; None: as stored, of products in one byte that of the
            embeddings. The module computes with what the bytes stand for, and keeps them at hand.

    Raises:
        CheckpointError: where a file is missing, damaged or does not fit the model; it names which.
    """
    component = read_config(folder)
    tensors = read_weights(folder)
    return build(component, tensors, os.fspath(folder), device=device, dtype=dtype)


def read_config(folder: str | os.PathLike[str]) -> Component:
    """Class, configuration and quantisation of a component folder.

    Raises:
        CheckpointError: where config.json is missing, damaged or of something else.
    """
    path = Path(folder) / CONFIG
    values = read_json(path)
    name = values.get("_class")
    config = {key: value for key, value in values.items() if not key.startswith("_")}
    try:
        if name == "Prior":
            quantization: Quantization | None = config.pop("quantization", None)
            if quantization is not None:
                quantization_dtype(quantization)
            return Component("prior", PriorConfig.from_dict(config), quantization)
        if name == "Tokenizer":
            return Component("tokenizer", TokenizerConfig.from_dict(config))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    raise CheckpointError(f"{path}: expected _class 'Prior' or 'Tokenizer', got {name!r}")


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor of a component folder, mapped."""
    tensors: dict[str, Tensor] = {}
    for path, names in weight_files(folder).items():
        part = read_safetensors(path).tensors
        lost = sorted((names or part.keys()) - part.keys())
        if lost:
            raise CheckpointError(f"{path}: missing tensors {', '.join(lost[:5])}")
        tensors.update({k: v for k, v in part.items() if names is None or k in names})
    return tensors


def weight_files(folder: str | os.PathLike[str]) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder and which tensors to take from each (None: all).

    Raises:
        CheckpointError: where a file is missing, or the index is damaged.
    """
    root = Path(folder)
    weights = read_json(root / CONFIG).get("_weights")
    if weights is None:
        weights = INDEX if (root / INDEX).is_file() else WEIGHTS
    if weights == WEIGHTS:
        return {_present(root / WEIGHTS): None}
    if weights != INDEX:
        raise CheckpointError(
            f"{root / CONFIG}: expected _weights {WEIGHTS} or {INDEX}, got {weights!r}"
        )
    where = read_json(root / INDEX).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{root / INDEX}: expected a weight_map, got {type(where).__name__}")
    files: dict[str, set[str]] = {}
    for tensor, name in where.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise CheckpointError(f"{root / INDEX}: refused file name {name!r}")
        files.setdefault(name, set()).add(tensor)
    return {_present(root / name): names for name, names in sorted(files.items())}


def _present(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing weights file")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB.

    Raises:
        CheckpointError: where it is missing, damaged or something else.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got a damaged file ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


__all__ = [
    "CONFIG", "INDEX", "MAX_SHARD_BYTES", "WEIGHTS", "load_model", "read_config", "read_json",
    "read_weights", "save_model", "weight_files", "write_safetensors",
]  # fmt: skip
