"""The state of the requests in flight: preallocated tensors, one row a slot, and one row to pad.

A slot of tokenizer v1 in bf16 is 16.8 MB: 7.1 of values times Wo and 0.6 of keys, of the group that
its next step reads (12 blocks), 6.3 of the token decoder's cache, 2.4 of three pictures in fp32,
0.4 of conditions. Nothing else grows with the requests; a fork copies the token decoder's part.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dar_fast.config import TokenizerConfig
from dar_fast.models import Tokenizer
from dar_fast.models.token_decoder import TokenCache

T = TypeVar("T")
NO_GROUP = -1


class Part(NamedTuple):
    """One preallocated tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def slot_parts(config: TokenizerConfig, slots: int, dtype: torch.dtype) -> dict[str, Part]:
    """The tensors of a `SlotState`, with the row that pads; `dtype`: the tokenizer's."""
    dit, rows, N, R = config.dit, slots + 1, config.num_tokens, config.image_size
    D, Dh, Q = config.decoder_dim, config.head_dim, config.group_size
    cache = Part((config.decoder_depth, rows, D // Dh, N, Dh), dtype)
    picture = Part((rows, 3, R, R), torch.promote_types(dtype, torch.float32))
    heads = (dit.depth, rows, dit.dim // dit.head_dim, Q)
    return {
        "codes": Part((rows, N), torch.int64),
        "conditions": Part((rows, N, D), dtype),
        "keys": cache,
        "values": cache,
        "x": picture,
        "previous": picture,
        "preview": picture,
        "group_keys": Part((*heads, dit.head_dim), dtype),
        "group_values": Part((*heads, dit.dim), dtype),
    }


def slot_bytes(config: TokenizerConfig, slots: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of every part of a `SlotState`; nothing is allocated."""
    parts = slot_parts(config, slots, dtype)
    return {name: prod(part.shape) * part.dtype.itemsize for name, part in parts.items()}


class SlotState:
    """What the requests in flight have, on the tokenizer's device and in its dtype.

    Row `padding`, the last one, takes what the rows that fill up a batch write.

    Args:
        tokenizer: whose pictures these are.
        slots: requests in flight at most, ≥ 1.

    Attributes:
        codes: int64 `[rows, N]`.
        conditions: `[rows, N, D]`, of the groups that `extended` counts.
        cache: the token decoder's keys and values, each `[layers, rows, H, N, Dh]`.
        x, previous, preview: `[rows, 3, R, R]` fp32: solver state, last velocity, last preview.
        group_keys, group_values: `[depth, rows, H, Q, Dh]` and `[depth, rows, H, Q, D]`: what the
            pixel DiT's blocks read of one group.
        group: that group, a slot each; `NO_GROUP` where there is none.
        extended: leading groups that have conditions, a slot each.
        step: the next solver step, a slot each; first_step: the one that the run started with.

    Raises:
        TypeError, ValueError: where `slots` is no integer ≥ 1.
    """

    def __init__(self, tokenizer: Tokenizer, slots: int) -> None:
        if isinstance(slots, bool) or not isinstance(slots, int):
            raise TypeError(f"slots: expected an integer, got {type(slots).__name__} {slots!r}")
        if slots < 1:
            raise ValueError(f"slots: expected an integer >= 1, got {slots}")
        self.slots, self.padding = slots, slots
        self.config, self.device = tokenizer.config, tokenizer.device
        # zeros: a row that pads is computed with, and must not slow arithmetic down by denormals
        parts = {
            name: torch.zeros(part.shape, dtype=part.dtype, device=self.device)
            for name, part in slot_parts(self.config, slots, tokenizer.dtype).items()
        }
        self.codes, self.conditions = parts["codes"], parts["conditions"]
        self.cache = TokenCache(parts["keys"], parts["values"])
        self.x, self.previous, self.preview = parts["x"], parts["previous"], parts["preview"]
        self.group_keys, self.group_values = parts["group_keys"], parts["group_values"]
        self.group = [NO_GROUP] * slots
        self.extended = [0] * slots
        self.step = [0] * slots
        self.first_step = [0] * slots

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes by part; see `slot_bytes`."""
        return slot_bytes(self.config, self.slots, self.conditions.dtype)

    def check(self, slot_ids: Sequence[int]) -> None:
        """Raise ValueError unless these are distinct slots, at least one."""
        inside = all(0 <= slot < self.slots for slot in slot_ids)
        if not slot_ids or not inside or len(set(slot_ids)) != len(slot_ids):
            raise ValueError(
                f"slots: expected distinct ones in [0, {self.slots}), got {list(slot_ids)}"
            )

    def filled(self, slot_ids: Sequence[int], size: int) -> Tensor:
        """Slots of a batch of `size` rows, int64 on the device: these, then the one that pads."""
        rows = [*slot_ids, *[self.padding] * (size - len(slot_ids))]
        return to_device(rows, torch.int64, self.device)

    def copy(self, src: int, dst: int, groups: int) -> None:
        """Fork: the codes of the first `groups` groups of `src` to `dst`, and what follows of them.

        Conditions are copied of the groups among them that have some: see `extended[dst]`. The
        picture is not: `Diffusion.start` gives `dst` its own noise.

        Raises:
            ValueError: where the slots are not two, or `groups` is outside [0, K].
        """
        self.check((src, dst))
        if not 0 <= groups <= self.config.num_groups:
            raise ValueError(
                f"groups: expected an integer in [0, {self.config.num_groups}], got {groups}"
            )
        end = groups * self.config.group_size
        self.codes[dst, :end] = self.codes[src, :end]
        self.group[dst] = NO_GROUP
        self.extended[dst] = min(groups, self.extended[src])
        end = self.extended[dst] * self.config.group_size
        self.conditions[dst, :end] = self.conditions[src, :end]
        for cache in self.cache:
            cache[:, dst, :, :end] = cache[:, src, :, :end]


class Launcher(Protocol):
    """Runs device work: as it is, or as a CUDA graph captured for these sizes.

    Work is a function of tensors that changes the slots in place, reads nothing back and returns
    nothing; the same key and input shapes mean the same work.
    """

    def size(self, rows: int) -> int:
        """The batch, at least `rows`, that a batch of so many is filled up to."""

    def __call__(
        self, key: tuple[str | int, ...], work: Callable[..., None], inputs: Sequence[Tensor]
    ) -> None:
        """Run `work(*inputs)`, or queue it on the current stream."""


class Direct:
    """The launcher that calls: no capture, no rows that pad."""

    def size(self, rows: int) -> int:
        return rows

    def __call__(
        self, key: tuple[str | int, ...], work: Callable[..., None], inputs: Sequence[Tensor]
    ) -> None:
        work(*inputs)


def batches(items: Sequence[T], apart: bool) -> list[list[T]]:
    """All in one batch, or each in a batch of its own; none of none."""
    if apart:
        return [[item] for item in items]
    return [list(items)] if items else []


def to_device(
    values: Sequence[int] | Sequence[float] | Sequence[bool],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """`[n]` on the device, by a copy that waits for nothing there."""
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


__all__ = [
    "NO_GROUP", "Direct", "Launcher", "Part", "SlotState", "batches", "slot_bytes", "slot_parts",
    "to_device",
]  # fmt: skip
