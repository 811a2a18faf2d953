"""Resumable training states: safetensors and JSON only, so nothing in them can execute.

A save writes model, average and optimizer states: about 4 float32 numbers a parameter with AdamW.
The folder takes its name last, and the pointer file `latest` moves after that.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dar_fast.files import atomic_write
from dar_train.optim import Ema

STEP_PREFIX = "step-"
FORMAT = 1


def _named(module: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in module.named_parameters()}


def _flatten(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    names = _named(module)
    return {
        f"{names[id(parameter)]}|{key}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _unflatten(
    tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, module: nn.Module
) -> None:
    parameters = dict(module.named_parameters())
    for joined, value in tensors.items():
        name, _, key = joined.rpartition("|")
        if name not in parameters:
            raise ValueError(f"checkpoint: expected optimizer state of this model, got {name!r}")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)


def _state_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}


def _write_pointer(folder: Path, pointer: str, name: str) -> None:
    with atomic_write(folder / pointer) as temporary:
        temporary.write_text(name + "\n")


def save_state(
    folder: Path,
    model: nn.Module,
    ema: Ema,
    optimizers: Sequence[torch.optim.Optimizer],
    state: Mapping[str, Any],
    *,
    pointers: Sequence[str] = ("latest",),
    keep: int = 2,
) -> Path:
    """Write one state under `folder`, point `pointers` at it, and drop all but the `keep` newest.

    `state` is plain JSON, but for tensors in `extra`, and must hold `step`.
    States that some pointer names are never dropped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{STEP_PREFIX}{int(state['step']):08d}"
    temporary = folder / f".{name}.{os.getpid()}"
    temporary.mkdir()
    try:
        save_file(_state_tensors(model), temporary / "model.safetensors")
        save_file(_state_tensors(ema.module), temporary / "ema.safetensors")
        for i, optimizer in enumerate(optimizers):
            save_file(_flatten(optimizer, model), temporary / f"optimizer-{i}.safetensors")
        extra = state.get("extra", {})
        tensors = {k: v for k, v in extra.items() if isinstance(v, Tensor)}
        save_file(tensors, temporary / "extra.safetensors")
        plain = {k: v for k, v in extra.items() if k not in tensors}
        record = {**state, "extra": plain, "format": FORMAT, "ema_updates": ema.updates}
        (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n")
        target = folder / name
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for pointer in pointers:
        _write_pointer(folder, pointer, name)
    _drop_old(folder, keep)
    return target


def _drop_old(folder: Path, keep: int) -> None:
    named = {p.read_text().strip() for p in folder.iterdir() if p.is_file() and p.name[0] != "."}
    states = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.startswith(STEP_PREFIX))
    for old in states[: -max(1, keep)]:
        if old.name not in named:
            shutil.rmtree(old)


def find_state(folder: Path, pointer: str = "latest") -> Path | None:
    """The folder that `pointer` names, or None where nothing was saved.

    Raises:
        ValueError: where the pointer names a state that is not there.
    """
    file = folder / pointer
    if not file.is_file():
        return None
    name = file.read_text().strip()
    target = folder / name
    if not name.startswith(STEP_PREFIX) or not (target / "state.json").is_file():
        raise ValueError(f"checkpoint: expected {file} to name a saved state, got {name!r}")
    return target


def read_record(state_folder: Path) -> dict[str, Any]:
    """The JSON part of a saved state.

    Raises:
        ValueError: where it is unreadable or of another format.
    """
    file = state_folder / "state.json"
    try:
        record = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint: expected readable JSON in {file}, got {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"checkpoint: expected format {FORMAT} in {file}")
    return record


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint: expected a readable {file}, got {error}") from error


def load_state(
    state_folder: Path,
    model: nn.Module,
    ema: Ema,
    optimizers: Sequence[torch.optim.Optimizer],
) -> dict[str, Any]:
    """Restore everything in place and return the JSON part.

    Raises:
        ValueError: where a file is missing or damaged, or is of another model or optimizer.
    """
    record = read_record(state_folder)
    saved = sorted(state_folder.glob("optimizer-*.safetensors"))
    if len(saved) != len(optimizers):
        raise ValueError(
            f"checkpoint: expected the states of {len(optimizers)} optimizers in {state_folder}, "
            f"got {len(saved)}"
        )
    try:
        model.load_state_dict(_read(state_folder / "model.safetensors"))
        ema.module.load_state_dict(_read(state_folder / "ema.safetensors"))
    except RuntimeError as error:
        raise ValueError(f"checkpoint: expected the weights of this model, got {error}") from error
    ema.updates = int(record["ema_updates"])
    if (state_folder / "extra.safetensors").is_file():
        record["extra"] |= _read(state_folder / "extra.safetensors")
    for optimizer, file in zip(optimizers, saved, strict=True):
        _unflatten(_read(file), optimizer, model)
    return record
