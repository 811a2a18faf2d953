"""Finding weights and configuration in an official file, whatever wraps them. REFERENCE §5."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dar_fast.checkpoint.assemble import Kind
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.official_config import find_official
from dar_fast.checkpoint.official_names import IGNORED, bare_name
from dar_fast.checkpoint.records import Record, plain
from dar_fast.checkpoint.safetensors_file import is_safetensors, official_metadata, read_safetensors
from dar_fast.checkpoint.unpickler import read_torch_file

WRAPPERS = ("ema", "model", "module", "state_dict")  # the first that holds weights is taken
_CONFIGS = ("config", "cfg", "args", "model_config", "hparams", "hyper_parameters")
_ROOTS: dict[str, Kind] = {
    "tok_embeddings": "prior", "cls_embedding": "prior", "layers": "prior",
    "encoder_layers": "tokenizer", "decoder_layers": "tokenizer", "patchify": "tokenizer",
    "quantize": "tokenizer", "diff_decoder": "tokenizer",
}  # fmt: skip
MAX_NESTING = 4


class OfficialState(NamedTuple):
    """The weights of one official model, under bare official names."""

    tensors: dict[str, Tensor]
    kind: Kind
    config: dict[str, Any] | None  # official, where the file has one
    wrapper: str  # such as "ema" or "model.module"; "" for a bare state dict
    keys: list[str]  # of the file


def read_official(
    source: str | os.PathLike[str] | Mapping[str, Any], *, verify: bool | None = None
) -> OfficialState:
    """The weights in a `.pt` or official-named `.safetensors` file, or in a dict of that form.

    Raises:
        CheckpointError: where it cannot be read, or holds no official model.
        TypeError: where `source` is neither path nor mapping.
    """
    if isinstance(source, Mapping):
        return _find(dict(source), "state dict")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path or a state dict, got {type(source).__name__}")
    where = os.fspath(source)
    value: Any
    try:
        safetensors = is_safetensors(where)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from error
    if safetensors:
        file = read_safetensors(where)
        value = {"model": file.tensors, "config": official_metadata(file.metadata)}
    else:
        value = read_torch_file(where, verify=verify)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a dict in the file, got {type(value).__name__}")
    return _find(value, where)


def _find(value: dict[Any, Any], where: str) -> OfficialState:
    found = _weights(value, ())
    if found is None:
        raise CheckpointError(
            f"{where}: expected the weights of an official prior or tokenizer, bare or under "
            f"{', '.join(WRAPPERS)}; got keys {[str(k)[:40] for k in list(value)[:6]]}"
        )
    path, state = found
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = bare_name(str(key))
        if IGNORED.search(name):
            continue
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{where}: {name}: expected a tensor, got {type(tensor).__name__}"
            )
        if name in tensors:
            raise CheckpointError(f"{where}: {name} is there twice, under two prefixes")
        tensors[name] = tensor.detach()
    kind = next(_ROOTS[root] for root in map(_root, tensors) if root in _ROOTS)
    keys = [str(key) for key in value] if path else []
    return OfficialState(tensors, kind, _config(value, kind), ".".join(path), keys)


def _root(name: object) -> str:
    return bare_name(str(name)).split(".", 1)[0]


def _weights(value: object, path: tuple[str, ...]) -> tuple[tuple[str, ...], dict[Any, Any]] | None:
    if isinstance(value, Record):
        value = value.items or value.state
    if not isinstance(value, Mapping) or len(path) > MAX_NESTING:
        return None
    if any(
        isinstance(v, Tensor) and _root(k) in _ROOTS and not IGNORED.search(str(k))
        for k, v in value.items()
    ):
        return path, dict(value)
    for key in WRAPPERS:
        found = _weights(value.get(key), (*path, key))
        if found is not None:
            return found
    return None


def _config(value: Mapping[Any, Any], kind: Kind) -> dict[str, Any] | None:
    given = {key: _inside(value[key]) for key in _CONFIGS if key in value}
    found = find_official(given, kind)
    size = next(
        (v["image_size"] for v in given.values() if isinstance(v, dict) and "image_size" in v), None
    )
    if found is not None and kind == "tokenizer" and isinstance(size, int):
        return {"image_size": size, **found}
    return found


def _inside(value: object) -> Any:
    """A plain configuration: of a record what it holds, of a live object its attributes."""
    if not isinstance(value, Record | dict | list | str | int | float | None):
        value = dict(getattr(value, "__dict__", {}))
        value = value.get("_data", value)
    return plain(value)


__all__ = ["WRAPPERS", "OfficialState", "read_official"]
