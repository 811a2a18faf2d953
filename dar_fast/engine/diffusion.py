"""Solver steps of requests that are each at a step of their own: one batch of the pixel DiT.

    v = velocity(x, times[step], group's keys and values), t a row
    x += h slope, preview = (x + (1 - t) v) / data_std: `flow_step`, t and h a row

A step costs the DiT's evaluation and nothing that could have been kept: the time embeddings of all
blocks are made once for a number of steps, a group's keys and values times Wo once for a request
and group, however many steps read it, and not at all where none does.
Source: arXiv 2505.23660, §3.2.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dar_fast.engine.rows import StepRow
from dar_fast.engine.slots import NO_GROUP, Direct, Launcher, SlotState, batches, to_device
from dar_fast.flow import sampling_times, start_from
from dar_fast.models import Tokenizer
from dar_fast.models.pixel_dit import BlockCondition
from dar_kernels import flow_step

TABLE_STEPS = 64  # time embeddings made together: of all steps, for any S up to this
TABLES = 64  # kept; the last used ones: 75 MB of tokenizer v1 in bf16 if all are full


def _nothing() -> None:
    """Between blocks, unless there is something to do."""


@lru_cache(maxsize=TABLES)
def _times(num_steps: int, time_shift: float) -> list[float]:
    return sampling_times(num_steps, time_shift).tolist()


class Diffusion:
    """The pixel DiT and the solver over slots.

    A row's picture is its own to rounding: the rows of a batch share the library's products, which
    may sum in another order for another batch. With `deterministic` every picture is evaluated in
    a batch of its own, and its bits are the same whoever else is in flight. It costs all that
    batching brings: an evaluation a picture instead of one a batch, the weights read for each.

    Where a batch shows on a CPU (torch 2.13, AVX-512, one thread and two): in fp32, products of few
    rows, of which MKL leaves a thread fewer than four (up to 3 rows, with two threads up to 10), so
    groups of few codes; and `absorb_output` where B Q D Dh is below a few hundred, which ATen
    multiplies itself. In bf16, batched products of tiny models, where B M N K crosses the 16^3 at
    which ATen turns to oneDNN. All other products, packed bf16 too, and attention gave equal bits
    in every size that was tried, up to 1024 rows a picture and 768 wide; no library promises that,
    and cuBLAS picks its kernel by size. The number of threads shows in the same fp32 products.

    Args:
        tokenizer: the model.
        slots: its state.
        deterministic: see above.
        launcher: runs the work on the device.
        between_blocks: called before each block of an evaluation, in the thread that runs it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        slots: SlotState,
        deterministic: bool = False,
        launcher: Launcher | None = None,
        between_blocks: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer, self.slots, self.deterministic = tokenizer, slots, deterministic
        self.launcher = Direct() if launcher is None else launcher
        self._between_blocks = between_blocks or _nothing
        self._tables: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    @torch.no_grad()
    def start(
        self,
        slot: int,
        noise_seed: int,
        *,
        init_image: Tensor | None = None,
        step: int = 0,
        num_steps: int | None = None,
    ) -> None:
        """Write the noise that a picture starts from; conditions, where there are any, stay.

        With `init_image` `[3, R, R]` in [-1, 1]: the state of an SDEdit-style start at `step` of
        `num_steps` (the configuration's by default), as `Tokenizer.decode` has it.

        Raises:
            ValueError: where an argument does not fit.
        """
        slots, config = self.slots, self.slots.config
        slots.check((slot,))
        S = config.num_steps if num_steps is None else num_steps
        if not 0 <= step < S or (init_image is None) != (step == 0):
            raise ValueError(
                f"step: expected one in [0, {S}), above 0 with an init_image only, got {step}"
            )
        x = self.tokenizer.noise([noise_seed], 1).to(slots.x.dtype)
        if init_image is not None:
            self.tokenizer.check_images(init_image[None])
            t = _times(S, config.dit.time_shift)[step]
            x = start_from(init_image[None].to(x), x, t, config.dit.data_std)
        slots.x[slot] = x[0]
        slots.step[slot] = slots.first_step[slot] = step

    def step(self, rows: Sequence[StepRow]) -> Tensor:
        """Take every row's step; the previews `[B, 3, R, R]` fp32 in image units, not clamped.

        The result is the caller's own. A row whose step was the last one taken is not stepped
        again, so what failed for some of its rows can be run again as a whole.

        Raises:
            ValueError: where a slot is not there or twice, a step is not its next one, or the
                group that it reads has no conditions yet.
        """
        slots = self.slots
        ids = [row.slot for row in rows]
        slots.check(ids)
        due = [row for row in rows if self._due(row)]
        stale = [row for row in due if slots.group[row.slot] != self._group(row)]
        for batch in batches(stale, self.deterministic):
            self._read_group(batch)
        for batch in batches(due, self.deterministic):
            self._advance(batch)
        return slots.preview.index_select(0, to_device(ids, torch.int64, slots.device))

    def image(self, slot: int) -> Tensor:
        """The state `[3, R, R]` in image units: the picture, once all steps are done."""
        self.slots.check((slot,))
        return self.slots.x[slot] / self.slots.config.dit.data_std

    def _group(self, row: StepRow) -> int:
        start = self.tokenizer.group_start(row.step, row.num_steps)
        return start // self.slots.config.group_size

    def _due(self, row: StepRow) -> bool:
        """Whether the step is still to be taken."""
        slots, slot = self.slots, row.slot
        due = slots.step[slot]
        if row.step == due - 1 and row.step >= slots.first_step[slot]:
            return False
        if row.step != due or not row.step < row.num_steps:
            raise ValueError(
                f"step: expected {due}, the next of slot {slot}, below num_steps "
                f"{row.num_steps}, got {row.step}"
            )
        group, ready = self._group(row), slots.extended[slot]
        if group >= ready:
            raise ValueError(
                f"step: expected conditions of group {group} for step {row.step} of slot {slot}, "
                f"got those of the first {ready} groups"
            )
        return True

    def _padded(self, rows: list[StepRow]) -> tuple[list[StepRow], Tensor]:
        """The batch filled up to the launcher's size, and its slots: what is added, to pad."""
        size = self.launcher.size(len(rows))
        ids = self.slots.filled([row.slot for row in rows], size)
        return rows + rows[-1:] * (size - len(rows)), ids

    def _read_group(self, rows: list[StepRow]) -> None:
        """Make what the blocks read of the group of each row."""
        slots = self.slots
        padded, ids = self._padded(rows)
        starts = [self._group(row) * slots.config.group_size for row in padded]
        for row in rows:
            slots.group[row.slot] = NO_GROUP  # until all of it is written
        inputs = ids, to_device(starts, torch.int64, slots.device)
        self.launcher(("conditions", len(padded)), self.condition, inputs)
        for row in rows:
            slots.group[row.slot] = self._group(row)

    def _advance(self, rows: list[StepRow]) -> None:
        slots, dit = self.slots, self.slots.config.dit
        padded, ids = self._padded(rows)
        times = [_times(row.num_steps, dit.time_shift) for row in padded]
        steps = [row.step for row in padded]
        first = [row.solver == "euler" or row.step == slots.first_step[row.slot] for row in padded]
        dtype, device = slots.x.dtype, slots.device
        inputs = (
            ids,
            torch.stack([self._time(row.step, row.num_steps) for row in padded], 1),
            to_device([t[i] for t, i in zip(times, steps, strict=True)], dtype, device),
            to_device([t[i + 1] for t, i in zip(times, steps, strict=True)], dtype, device),
            to_device(first, torch.bool, device),
        )
        self.launcher(("step", len(padded)), self.evaluate, inputs)
        for row in rows:
            slots.step[row.slot] = row.step + 1

    @torch.no_grad()
    def _time(self, step: int, num_steps: int) -> Tensor:
        """Time embeddings of a step, `[depth, D]`: the same numbers whoever asks."""
        key = num_steps, step // TABLE_STEPS
        table = self._tables.get(key)
        if table is None:
            begin = key[1] * TABLE_STEPS
            times = _times(num_steps, self.slots.config.dit.time_shift)[:-1]
            t = to_device(times[begin : begin + TABLE_STEPS], torch.float32, self.slots.device)
            table = torch.stack(list(self.tokenizer.pixel_dit.times(t)), 1)  # [steps, depth, D]
            self._tables[key] = table
            if len(self._tables) > TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return table[step % TABLE_STEPS]

    @torch.no_grad()
    def condition(self, slot_ids: Tensor, starts: Tensor) -> None:
        """Device work: every block's keys and values of a group, into the slots.

        Args:
            slot_ids: int64 `[B]`.
            starts: int64 `[B]`, the first token of each row's group.
        """
        slots = self.slots
        columns = starts[:, None] + torch.arange(slots.config.group_size, device=slots.device)
        cond = slots.conditions[slot_ids[:, None], columns]  # [B, Q, D]
        for i, block in enumerate(self.tokenizer.pixel_dit.conditions(cond)):
            slots.group_keys[i].index_copy_(0, slot_ids, block.keys)
            slots.group_values[i].index_copy_(0, slot_ids, block.values_out)

    def _conditions(self, slot_ids: Tensor) -> Iterator[BlockCondition]:
        """What each block reads, made when the block comes."""
        for keys, values in zip(self.slots.group_keys, self.slots.group_values, strict=True):
            self._between_blocks()
            yield BlockCondition(keys.index_select(0, slot_ids), values.index_select(0, slot_ids))

    @torch.no_grad()
    def evaluate(
        self, slot_ids: Tensor, times: Tensor, t: Tensor, next_t: Tensor, first: Tensor
    ) -> None:
        """Device work: one step of every row; all that is written is written at the end.

        Args:
            slot_ids: int64 `[B]`.
            times: `[depth, B, D]`, every block's embedding of t.
            t, next_t: fp32 `[B]` in [0, 1].
            first: bool `[B]`: rows that take an Euler step.
        """
        slots, dit = self.slots, self.tokenizer.pixel_dit
        x = slots.x.index_select(0, slot_ids)
        tokens = dit.velocity(x.to(self.tokenizer.dtype), times, self._conditions(slot_ids)).tokens
        previous = slots.previous.index_select(0, slot_ids)
        preview = flow_step(
            x, tokens, previous, t, next_t, slots.config.dit.data_std, "adams2", dit.patch_size,
            first=first,
        )  # fmt: skip
        for rows, new in ((slots.x, x), (slots.previous, previous), (slots.preview, preview)):
            rows.index_copy_(0, slot_ids, new)


__all__ = ["Diffusion"]
