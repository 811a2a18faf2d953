"""Official checkpoints to our modules and back: names and shapes by `official_names`, strictly."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dar_fast.checkpoint.assemble import Component, Kind, build, check_names, empty
from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.official_config import prior_config, tokenizer_config
from dar_fast.checkpoint.official_names import names, official_shape, our_shape
from dar_fast.checkpoint.official_state import OfficialState, read_official
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer

Source = str | os.PathLike[str] | Mapping[str, Any]
_REPA = "diff_decoder.net.repa_out."


def load_official_prior(
    source: Source,
    config: PriorConfig | Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    verify: bool | None = None,
) -> Prior:
    """The prior of an official file or state dict, in evaluation mode.

    Args:
        source: a `.pt` file (read without executing anything in it), an official-named
            `.safetensors` file, or a state dict, bare or wrapped. A state dict is copied, a file
            is mapped.
        config: ours or the official dict; None: the file's own, and what it lacks from the shapes.
        dtype: of the weights; None: as stored.
        verify: check every checksum of a `.pt` file; None: where it has at most 64 MiB.

    Raises:
        CheckpointError: where the source cannot be read or does not fit; it names what does not.
        TypeError, ValueError: where an argument is of the wrong kind.
    """
    state = read_official(source, verify=verify)
    if config is not None and not isinstance(config, PriorConfig | Mapping):
        raise TypeError(f"config: expected a PriorConfig or a dict, got {type(config).__name__}")
    module = load_state(source, state, "prior", resolve(source, state, "prior", config), dtype)
    assert isinstance(module, Prior)
    return module


def load_official_tokenizer(
    source: Source,
    config: TokenizerConfig | Mapping[str, Any] | None = None,
    *,
    image_size: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    verify: bool | None = None,
) -> Tokenizer:
    """The tokenizer of an official file or state dict, as `load_official_prior` does it.

    A file without the alignment head gives a model without it, whatever `config` says.

    Args:
        image_size: R, which official configurations do not say; None: "image_size" of `config`,
            else 256, or with fewer than 256 tokens 16 DiT patches.
    """
    state = read_official(source, verify=verify)
    if config is not None and not isinstance(config, TokenizerConfig | Mapping):
        raise TypeError(
            f"config: expected a TokenizerConfig or a dict, got {type(config).__name__}"
        )
    resolved = resolve(source, state, "tokenizer", config, image_size)
    module = load_state(source, state, "tokenizer", resolved, dtype)
    assert isinstance(module, Tokenizer)
    return module


def resolve(
    source: Source,
    state: OfficialState,
    kind: Kind,
    config: PriorConfig | TokenizerConfig | Mapping[str, Any] | None = None,
    image_size: int | None = None,
) -> Component:
    """What the model is: the given configuration, else the file's, filled up from the shapes.

    Raises:
        CheckpointError: where it cannot be told, or does not fit.
        ValueError: where `config` is a dict of our form with unknown keys.
    """
    where = _where(source)
    if state.kind != kind:
        raise CheckpointError(f"{where}: expected a {kind}, got a {state.kind}")
    cls = PriorConfig if kind == "prior" else TokenizerConfig
    if isinstance(config, Mapping) and config.keys() & {"depth", "code_dim", "dit"}:
        config = cls.from_dict(dict(config))
    if isinstance(config, PriorConfig):
        return Component("prior", config)
    if isinstance(config, TokenizerConfig):
        has_head = any(name.startswith(_REPA) for name in state.tensors)
        if not has_head and config.dit.repa_layer is not None:
            dit = dataclasses.replace(config.dit, repa_layer=None)
            config = dataclasses.replace(config, dit=dit)
        return Component("tokenizer", config)
    official = dict(config if config is not None else state.config or {})
    try:
        if kind == "prior":
            return Component("prior", prior_config(official, state.tensors))
        return Component("tokenizer", tokenizer_config(official, state.tensors, image_size))
    except (CheckpointError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def load_state(
    source: Source,
    state: OfficialState,
    kind: Kind,
    component: Component,
    dtype: torch.dtype | None,
) -> Prior | Tokenizer:
    """The module of a configuration with the tensors of an official state."""
    where = _where(source)
    tensors = state.tensors
    if isinstance(component.config, TokenizerConfig) and component.config.dit.repa_layer is None:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(_REPA)}
    try:
        expected = empty(component, len(tensors)).state_dict()
        table = names(component.config)
        check_names(set(table), set(tensors))
        renamed = {
            table[name]: our_shape(name, tensor, tuple(expected[table[name]].shape))
            for name, tensor in tensors.items()
        }
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if isinstance(source, Mapping):
        renamed = {name: tensor.clone() for name, tensor in renamed.items()}
    return build(component, renamed, where, dtype=dtype)


def _where(source: Source) -> str:
    return "state dict" if isinstance(source, Mapping) else os.fspath(source)


def to_official(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a Prior or a Tokenizer under official names, in official shapes, not copied.

    Raises:
        TypeError: where `module` is neither.
    """
    if not isinstance(module, Prior | Tokenizer):
        raise TypeError(f"module: expected a Prior or a Tokenizer, got {type(module).__name__}")
    state = module.state_dict()
    return {
        name: official_shape(name, state[ours].detach())
        for name, ours in names(module.config).items()
    }


__all__ = ["load_official_prior", "load_official_tokenizer", "to_official"]
