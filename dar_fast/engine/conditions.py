"""Conditions group by group: the token decoder takes the Q codes of a group behind its cache.

24 Q D^2 FLOPs a picture and layer; the layers' weights are read once a batch, 113 MB of tokenizer
v1 in bf16. What the pixel DiT's blocks make of a group is left to the step that reads it.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dar_fast.engine.slots import NO_GROUP, Direct, Launcher, SlotState, batches
from dar_fast.models import Tokenizer


class Conditions:
    """The token decoder over slots.

    Args:
        tokenizer: the model.
        slots: its state; `slots.codes` are read, `slots.conditions` and `slots.cache` written.
        deterministic: every picture in a batch of its own; see `Diffusion`.
        launcher: runs the work on the device.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: SlotState,
        deterministic: bool = False,
        launcher: Launcher | None = None,
    ) -> None:
        self.tokenizer, self.slots, self.deterministic = tokenizer, slots, deterministic
        self.launcher = Direct() if launcher is None else launcher

    def extend(self, group: int, slot_ids: Sequence[int]) -> None:
        """Conditions of the codes of `group`, behind those of the groups before it.

        Done again it gives the same, and undoes the groups behind: their codes may be new.

        Raises:
            ValueError: where the group or a slot does not exist, or a group before it has no
                conditions yet.
        """
        slots, K = self.slots, self.slots.config.num_groups
        slots.check(slot_ids)
        if not 0 <= group < K:
            raise ValueError(f"group: expected an integer in [0, {K}), got {group}")
        for slot in slot_ids:
            if slots.extended[slot] < group:
                raise ValueError(
                    f"group: expected at most {slots.extended[slot]}, the next one of slot {slot}, "
                    f"got {group}"
                )
        for slot in slot_ids:
            slots.extended[slot] = group
            if slots.group[slot] >= group:
                slots.group[slot] = NO_GROUP
        for batch in batches(slot_ids, self.deterministic):
            ids = slots.filled(batch, self.launcher.size(len(batch)))
            self.launcher(("extend", group, len(ids)), partial(self.compute, group), (ids,))
            for slot in batch:
                slots.extended[slot] = group + 1

    @torch.no_grad()
    def compute(self, group: int, slot_ids: Tensor) -> None:
        """The work of `extend` on the device: `slot_ids` int64 `[B]`; `group` is a constant."""
        slots, Q = self.slots, self.slots.config.group_size
        past = group * Q
        codes = slots.codes[:, past : past + Q].index_select(0, slot_ids)  # [B, Q]
        embedded = self.tokenizer.quantizer.embed(codes)
        new = self.tokenizer.token_decoder.extend(embedded, slots.cache, past, slot_ids)
        slots.conditions[:, past : past + Q].index_copy_(0, slot_ids, new)


__all__ = ["Conditions"]
