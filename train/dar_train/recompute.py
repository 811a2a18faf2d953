"""Activations that the backward pass makes again: a block's memory for a little of its time.

    none       everything that the backward pass reads is kept
    selective  results of matrix products and of attention are kept; norms, activations, rotations
               and modulation, a few operations a number, are made again
    full       only a block's inputs are kept; its forward pass runs twice, a third more FLOPs

Source: Korthikanti et al., 2022 (arXiv 2205.05198), §5.
"""

from collections.abc import Callable, Iterable
from contextvars import copy_context
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Recompute = Literal["none", "selective", "full"]

# bmm is not among them: plain attention has its scores, [B, H, N, N], by it
PRODUCTS = {"aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm", "dar::adaln_modulate"}
ATTENTION = ("attention", "attn", "flash_fwd")  # in the names of torch's, ours and the libraries'


def is_kept(name: str) -> bool:
    """Whether "selective" keeps the result of the operation `name`, as in "aten::mm"."""
    name = name.partition(".")[0]
    return name in PRODUCTS or any(part in name for part in ATTENTION)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if is_kept(operation.name()):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _again(forward: Callable[..., Any], options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if torch.compiler.is_compiling():
        return checkpoint(forward, *args, **options, **kwargs)
    chosen = copy_context()  # what `require` says: a GPU's backward pass has a thread of its own

    def inside(*args: Any, **kwargs: Any) -> Any:
        return chosen.copy().run(forward, *args, **kwargs)

    return checkpoint(inside, *args, **options, **kwargs)


def recompute(blocks: Iterable[nn.Module], mode: Recompute) -> None:
    """Make each of `blocks` recompute in its backward pass, in place; before it is compiled.

    Gradients are those of a block left alone. Names of parameters stay, and so do hooks: FSDP's run
    around both passes. Random numbers are drawn twice alike if the block has a dropout.

    Raises:
        ValueError: where there is no such mode.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute: expected one of {list(get_args(Recompute))}, got {mode!r}")
    if mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks:
        random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in block.modules())
        chosen = {**options, "preserve_rng_state": random}
        block.forward = partial(_again, block.forward, chosen)
