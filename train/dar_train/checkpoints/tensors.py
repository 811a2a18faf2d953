"""A training state as tensors by name, `part/name`, and back: in place, whatever the sharding.

Names are those of the bare model, so a state saved under DDP, FSDP2 or torch.compile fits all.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.nn.parallel import DistributedDataParallel

WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # torch.compile's, torch's recomputation's


class TrainState(NamedTuple):
    """What a checkpoint holds beside its JSON record.

    Settings of the optimizers' groups are not in it: they are the recipe's.
    """

    model: nn.Module
    averaged: nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    extra: dict[str, Tensor]  # the same on all ranks; filled when a state is loaded


def bare_name(name: str) -> str:
    """A parameter's name without what wraps its module."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _bare(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _module_tensors(part: str, module: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, value in _bare(module).state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"checkpoint: expected tensors only, got {part} {name} {type(value)}")
        tensors[f"{part}/{bare_name(name)}"] = value
    return tensors


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    return {bare_name(name): p for name, p in _bare(module).named_parameters()}


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Everything to save by name; shards stay shards.

    Raises:
        TypeError: where a module's state holds something else than tensors.
        ValueError: where an optimizer has parameters that the model has not.
    """
    tensors = _module_tensors("model", state.model) | _module_tensors("averaged", state.averaged)
    names = {id(parameter): name for name, parameter in _parameters(state.model).items()}
    for i, optimizer in enumerate(state.optimizers):
        for parameter, values in optimizer.state.items():
            if id(parameter) not in names:
                raise ValueError(
                    f"checkpoint: expected optimizer {i} to train the model's parameters, got one "
                    f"of shape {tuple(parameter.shape)} that is none of them"
                )
            for key, value in values.items():
                name = f"optimizer-{i}/{names[id(parameter)]}/{key}"
                tensors[name] = torch.as_tensor(value).detach()
    return tensors | {f"extra/{name}": tensor.detach() for name, tensor in state.extra.items()}


def targets(state: TrainState, saved: Mapping[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    """Tensors to read `saved` into: the modules' own, and new ones for the rest.

    Raises:
        ValueError: where the saved tensors are not those of this state: the first one is named.
    """
    wanted = _module_tensors("model", state.model) | _module_tensors("averaged", state.averaged)
    parameters = _parameters(state.model)
    groups = [
        {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for optimizer in state.optimizers
    ]
    for name, tensor in saved.items():
        part, _, inner = name.partition("/")
        if part == "extra":
            wanted[name] = torch.empty(tensor.size, dtype=tensor.properties.dtype)
        elif part.startswith("optimizer-"):
            i, (owner, _, _) = int(part.removeprefix("optimizer-")), inner.rpartition("/")
            parameter = parameters.get(owner)
            group = groups[i].get(id(parameter)) if i < len(groups) else None
            if parameter is None or group is None:
                raise ValueError(
                    f"checkpoint: expected states of these {len(groups)} optimizers, got {name}"
                )
            wanted[name] = _optimizer_target(parameter, group, tensor)
    for name, target in wanted.items():
        if name not in saved:
            raise ValueError(f"checkpoint: expected {name} {list(target.shape)}, got none")
        shape, dtype = saved[name].size, saved[name].properties.dtype
        if target.shape != shape or target.dtype != dtype:
            raise ValueError(
                f"checkpoint: expected {name} {list(target.shape)} {target.dtype}, "
                f"got {list(shape)} {dtype}"
            )
    for name in saved:
        if name not in wanted:
            raise ValueError(f"checkpoint: expected the tensors of this model, got {name}")
    return wanted


def _optimizer_target(
    parameter: nn.Parameter, group: dict[str, object], saved: TensorStorageMetadata
) -> Tensor:
    dtype = saved.properties.dtype
    if parameter.shape == saved.size and parameter.ndim > 0:
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    on_device = group.get("fused") or group.get("capturable")
    device = parameter.device if saved.size or on_device else torch.device("cpu")
    return torch.zeros(saved.size, dtype=dtype, device=device)


def restore(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Give optimizers and `extra` their tensors; the modules' were read in place."""
    parameters = _parameters(state.model)
    for optimizer in state.optimizers:
        optimizer.state.clear()
    state.extra.clear()
    for name, tensor in tensors.items():
        part, _, inner = name.partition("/")
        if part == "extra":
            state.extra[inner] = tensor
        elif part.startswith("optimizer-"):
            owner, _, key = inner.rpartition("/")
            optimizer = state.optimizers[int(part.removeprefix("optimizer-"))]
            optimizer.state[parameters[owner]][key] = tensor
