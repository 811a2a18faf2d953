"""Optimizers over parameter groups, learning-rate schedules, and the moving average of the weights.

AdamW reads and writes 7 numbers a parameter and step; Muon adds five Newton-Schulz rounds a matrix,
O(rows·columns·min(rows, columns)), and the average 3 numbers a parameter.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dar_train.shards import local

Schedule = Literal["constant", "linear", "cosine", "wsd"]
MUON_MOMENTUM = 0.95


class ParameterSplit(NamedTuple):
    """Names and parameters by how they are trained."""

    hidden: list[tuple[str, nn.Parameter]]  # matrices inside repeated blocks: Muon's
    decayed: list[tuple[str, nn.Parameter]]  # the other tensors of two or more dimensions
    plain: list[tuple[str, nn.Parameter]]  # vectors: no weight decay


def split_parameters(module: nn.Module) -> ParameterSplit:
    """Sort trainable parameters; hidden are the weights of linear layers in any nn.ModuleList."""
    hidden_ids = {
        id(layer.weight)
        for blocks in module.modules()
        if isinstance(blocks, nn.ModuleList)
        for layer in blocks.modules()
        if isinstance(layer, nn.Linear)
    }
    split = ParameterSplit([], [], [])
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in hidden_ids:
            split.hidden.append((name, parameter))
        elif parameter.ndim >= 2:
            split.decayed.append((name, parameter))
        else:
            split.plain.append((name, parameter))
    return split


def _adamw(
    split: Sequence[tuple[list[tuple[str, nn.Parameter]], float]],
    lr: float,
    betas: tuple[float, float],
) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for _, p in members], "weight_decay": decay, "base_lr": lr}
        for members, decay in split
        if members
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def build_optimizers(
    module: nn.Module,
    kind: Literal["adamw", "muon"],
    *,
    lr: float,
    muon_lr: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon over the hidden matrices with AdamW over the rest.

    Weight decay applies to tensors of two or more dimensions only. Each group keeps its peak rate
    in `base_lr`, which `set_learning_rate` scales.
    """
    split = split_parameters(module)
    if kind == "adamw" or not split.hidden:
        matrices = split.hidden + split.decayed
        return [_adamw([(matrices, weight_decay), (split.plain, 0.0)], lr, betas)]
    if kind != "muon":
        raise ValueError(f"optimizer: expected 'adamw' or 'muon', got {kind!r}")
    muon = torch.optim.Muon(
        [{"params": [p for _, p in split.hidden], "base_lr": muon_lr}],
        lr=muon_lr,
        momentum=MUON_MOMENTUM,
        weight_decay=weight_decay,
    )
    optimizers: list[torch.optim.Optimizer] = [muon]
    if split.decayed or split.plain:
        optimizers.append(_adamw([(split.decayed, weight_decay), (split.plain, 0.0)], lr, betas))
    return optimizers


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], scale: float) -> None:
    """Every group's rate becomes `scale` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale


def progress(step: int, steps: int | None, seconds: float, budget: float | None) -> float:
    """How much of the run is over, 0 to 1: by steps or training seconds, whichever is further."""
    by_steps = step / steps if steps else 0.0
    by_time = seconds / budget if budget else 0.0
    return min(1.0, max(by_steps, by_time))


def rate_scale(
    step: int,
    done: float,
    *,
    schedule: Schedule = "constant",
    warmup: int = 0,
    decay_fraction: float = 0.2,
    final: float = 0.0,
) -> float:
    """The learning rate as a fraction of its peak, at 0-based `step` with `done` of the run over.

    Warm-up is linear in steps. "linear" and "wsd" hold, then fall to `final` over the last
    `decay_fraction` (wsd by 1 - sqrt, arXiv 2405.18392); "cosine" falls all the way.
    """
    warm = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if schedule == "constant":
        shape = 1.0
    elif schedule == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * done))
    elif schedule in ("linear", "wsd"):
        start = 1.0 - decay_fraction
        through = (done - start) / decay_fraction if decay_fraction > 0 and done > start else 0.0
        shape = 1.0 - (through if schedule == "linear" else math.sqrt(through))
    else:
        raise ValueError(f"schedule: expected constant, linear, cosine or wsd, got {schedule!r}")
    return warm * (final + (1.0 - final) * shape)


class Ema:
    """Exponential moving average of a module, kept as a second module ready for evaluation.

    Of a sharded module every rank keeps its shards' average, with no message.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over n updates, so early averages forget
    the initial weights. Decay 0 keeps no average: `module` is the trained one, `saved` is empty.
    """

    def __init__(self, module: nn.Module, decay: float, updates: int = 0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"ema: expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.updates = updates
        if decay == 0.0:
            self.module, self.saved = module, nn.Module()
            return
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.saved = self.module  # what a state has beside the model
        self._average = list(self.module.parameters())
        self._source = list(module.parameters())
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        if self.decay == 0.0:
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average: list[Tensor] = [local(p) for p in self._average]
        source: list[Tensor] = [local(p) for p in self._source]
        torch._foreach_lerp_(average, source, 1.0 - decay)
        for mine, theirs in self._buffers:
            mine.copy_(theirs)
