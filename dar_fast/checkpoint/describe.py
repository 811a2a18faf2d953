"""What a model file or folder holds, without loading its weights: headers and the pickle only."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dar_fast.checkpoint.assemble import check_names, check_shapes, empty
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.folder import read_config, read_json, weight_files
from dar_fast.checkpoint.official import load_state, resolve
from dar_fast.checkpoint.official_state import read_official
from dar_fast.checkpoint.pipeline_folder import PIPELINE_INDEX
from dar_fast.checkpoint.quantized_state import check_dtypes, expected_state, scale_names
from dar_fast.checkpoint.safetensors_file import TensorHeader, is_safetensors, read_headers


def describe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in an official file, a component folder or a pipeline folder, as JSON values.

    Keys: path, format ("torch", "safetensors", "folder", "pipeline" or None), bytes, refused (None,
    or why it cannot be read or does not fit), and of one model kind, config, parameters, tensors,
    dtypes (parameters by dtype); of a component folder quantization (None, "int8" or "fp8", whose
    scales are tensors but no parameters); of official files wrapper (where the weights were) and
    keys; of a pipeline components and labels.
    """
    place = Path(path)
    found: dict[str, Any] = {"path": os.fspath(path), "format": None, "refused": None}
    try:
        if not place.exists():
            raise CheckpointError(f"{place}: no such file or folder")
        found["bytes"] = _bytes(place)
        if (place / PIPELINE_INDEX).is_file():
            _pipeline(place, found)
        elif place.is_dir():
            found["format"] = "folder"
            _folder(place, found)
        else:
            found["format"] = "safetensors" if is_safetensors(place) else "torch"
            _official(place, found)
    except CheckpointError as error:
        found["refused"] = str(error)
    except OSError as error:
        found["refused"] = f"{place}: cannot be read ({error.strerror})"
    return found


def _bytes(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def _pipeline(place: Path, found: dict[str, Any]) -> None:
    found["format"] = "pipeline"
    found["components"] = {name: describe(place / name) for name in ("prior", "tokenizer")}
    labels = read_json(place / PIPELINE_INDEX).get("labels")
    found["labels"] = len(labels) if isinstance(labels, list) else 0
    reasons = (part["refused"] for part in found["components"].values())
    found["refused"] = next((reason for reason in reasons if reason), None)


def _folder(place: Path, found: dict[str, Any]) -> None:
    component = read_config(place)
    found.update(
        kind=component.kind,
        quantization=component.quantization,
        config=component.config.to_dict(),
    )
    headers: dict[str, TensorHeader] = {}
    for path, names in weight_files(place).items():
        part = read_headers(path)
        headers.update({k: v for k, v in part.items() if names is None or k in names})
    _count(found, headers.values())
    try:
        expected = expected_state(empty(component, len(headers)), component.quantization)
        check_names(set(expected), set(headers))
        check_shapes(expected, {name: header.shape for name, header in headers.items()})
        check_dtypes(expected, {name: header.torch_dtype for name, header in headers.items()})
        scales = {name: headers[name] for name in scale_names(expected)}
        _count(found, (header for name, header in headers.items() if name not in scales))
        found["tensors"] += len(scales)
    except CheckpointError as error:
        raise CheckpointError(f"{place}: {error}") from error


def _official(place: Path, found: dict[str, Any]) -> None:
    state = read_official(place, verify=False)
    found.update(kind=state.kind, wrapper=state.wrapper, keys=state.keys)
    _count(
        found,
        (
            TensorHeader(str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for t in state.tensors.values()
        ),
    )
    component = resolve(place, state, state.kind)
    found["config"] = component.config.to_dict()
    load_state(place, state, state.kind, component, None)  # checks names and shapes, reads nothing


def _count(found: dict[str, Any], headers: Iterable[TensorHeader]) -> None:
    dtypes: Counter[str] = Counter()
    tensors = 0
    for header in headers:
        dtypes[header.dtype] += header.elements
        tensors += 1
    found.update(parameters=dtypes.total(), tensors=tensors, dtypes=dict(dtypes))


__all__ = ["describe"]
