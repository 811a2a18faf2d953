"""Groups of codes on a GPU: Q decode steps of a batch are one graph, launched once a group.

A step is six launches a layer and at most seven beside them (see `GraphTokens.launches_per_token`);
positions, scales and the code before stay on the device, nothing is read back. Memory bound: every
weight once for up to 8 requests with both their rows, and the pages of each row.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_fast.engine.graphs import Capture, GraphCache, GraphReport, capture_for
from dar_fast.engine.rows import TokenRow
from dar_fast.engine.tokens import NO_PAGE, check_rows, forced_codes
from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights, filter_settings
from dar_kernels import guided_sample
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.decoder_weights import DecoderWeights, new_decoder_pages
from dar_kernels.pages import PAGE_SIZE

IDLE = -1  # the position of a row that pads a bucket, or of the null row of an unguided request
ALIGN = 16  # bytes: kernels load whole lines from where a field starts


class Fields(NamedTuple):
    """What a group is told, for B requests and R = 2 B rows: conditional ones, then null ones."""

    seeds: Tensor  # [B] int64
    slots: Tensor  # [B] int64
    labels: Tensor  # [R] int64
    starts: Tensor  # [R] int64, the first position, or IDLE
    forced: Tensor  # [Q, B] int64, -1: to be drawn
    guidance: Tensor  # [Q, B] fp32
    temperature: Tensor  # [B] fp32
    top_p: Tensor  # [B] fp32
    top_k: Tensor  # [B] int32
    table: Tensor  # [R, pages] int32


class Inputs:
    """The fields of one bucket in one static buffer on the device, filled by one copy."""

    def __init__(self, bucket: int, group_size: int, pages: int, device: torch.device) -> None:
        B, R, Q = bucket, 2 * bucket, group_size
        wide, real, whole = torch.int64, torch.float32, torch.int32
        shapes: tuple[tuple[torch.dtype, tuple[int, ...]], ...] = (
            (wide, (B,)), (wide, (B,)), (wide, (R,)), (wide, (R,)), (wide, (Q, B)),
            (real, (Q, B)), (real, (B,)), (real, (B,)), (whole, (B,)), (whole, (R, pages)),
        )  # fmt: skip
        sizes = [-(-prod(shape) * dtype.itemsize // ALIGN) * ALIGN for dtype, shape in shapes]
        self.bucket = bucket
        self._there = torch.zeros(sum(sizes), dtype=torch.uint8, device=device)
        self._here = torch.zeros(sum(sizes), dtype=torch.uint8)

        def fields(buffer: Tensor) -> Fields:
            parts = zip(torch.split(buffer, sizes), shapes, strict=True)
            return Fields(
                *(
                    part[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
                    for part, (dtype, shape) in parts
                )
            )

        self.fields, self._host = fields(self._there), fields(self._here)

    def fill(self, rows: Sequence[TokenRow], null_class: int, spare: int) -> None:
        """Upload rows, and idle ones up to the bucket; waits for nothing on the device."""
        B, host, padding = self.bucket, self._host, self.bucket - len(rows)
        host.seeds.copy_(torch.tensor([row.seed for row in rows] + [0] * padding))
        host.slots.copy_(torch.tensor([row.slot for row in rows] + [spare] * padding))
        labels = [row.label for row in rows] + [null_class] * (padding + B)
        host.labels.copy_(torch.tensor(labels))
        starts = [row.position for row in rows] + [IDLE] * padding
        null_starts = [IDLE if row.null_pages is None else row.position for row in rows]
        host.starts.copy_(torch.tensor(starts + null_starts + [IDLE] * padding))
        n = len(rows)
        host.forced.fill_(0)  # a padding row is told its codes
        host.forced[:, :n] = torch.tensor([forced_codes(row) for row in rows]).T
        host.guidance.fill_(1)
        for column, row in enumerate(rows):
            if row.null_pages is not None:
                host.guidance[:, column] = torch.tensor(row.guidance)
        filters = [filter_settings(row.top_k, row.top_p) for row in rows]
        host.temperature.copy_(torch.tensor([row.temperature for row in rows] + [0.0] * padding))
        host.top_k.copy_(torch.tensor([k for k, _ in filters] + [0] * padding))
        host.top_p.copy_(torch.tensor([p for _, p in filters] + [1.0] * padding))
        host.table.fill_(NO_PAGE)
        for index, row in enumerate(rows):
            for line, pages in ((index, row.pages), (B + index, row.null_pages or ())):
                host.table[line, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        # A pinned block of the host's allocator is not given out again before its copy is done.
        here = self._here.pin_memory() if self._there.is_cuda else self._here
        self._there.copy_(here, non_blocking=True)


class GraphTokens:
    """Draws groups by captured graphs; see `TokenRunner`. One thread only.

    A request's codes do not depend on its batch, to the bit where the ops are Triton's.

    Args:
        prior: its weights are read where they are.
        codes: int64 `[slots, N]`, of the slots; read behind a group and written at its end.
        num_pages: of 32 keys and values a layer.
        group_size: Q.
        spare: a row of `codes` that belongs to no request: rows that pad a bucket write there.
        largest: requests in a group at most.
        weights: of the prior, as they are or quantised; None: as they are.
        page_dtype: that of the weights, int8 or float8_e4m3fn; None: that of the weights.
        capture: None: CUDA graphs on a CUDA device, else none.
        implementation: of the ops: `triton` or `torch`; None: Triton on a CUDA device, else
            `torch`.

    Raises:
        TypeError, ValueError: where sizes, weights or pages cannot be.
    """

    def __init__(
        self,
        prior: Prior,
        codes: Tensor,
        num_pages: int,
        *,
        group_size: int,
        spare: int,
        largest: int,
        weights: DecoderWeights | None = None,
        page_dtype: torch.dtype | None = None,
        capture: Capture | None = None,
        implementation: str | None = None,
    ) -> None:
        slots, N = codes.shape
        if not 0 <= spare < slots:
            raise ValueError(f"spare: expected a row of codes in [0, {slots}), got {spare}")
        if group_size < 1 or N % group_size:
            raise ValueError(f"group_size: expected a divisor of {N}, got {group_size}")
        self.prior, self.codes, self.spare, self.group_size = prior, codes, spare, group_size
        self.device = codes.device
        self.weights = decoder_weights(prior) if weights is None else weights
        dtype = prior.class_embedding.weight.dtype if page_dtype is None else page_dtype
        self.pages = new_decoder_pages(self.weights, num_pages, dtype)
        self.cache = GraphCache(capture or capture_for(self.device), largest)
        by_default = "triton" if self.device.type == "cuda" else "torch"
        self.implementation = implementation or by_default
        self._inputs: dict[int, Inputs] = {}
        self._steps = torch.arange(group_size, device=self.device)[:, None]  # [Q, 1]

    @torch.no_grad()
    def run(self, rows: Sequence[TokenRow]) -> Tensor:
        """Codes int64 `[B, Q]` on the device, which are also in the slots' codes.

        Raises:
            ValueError: where a row does not fit, or they are too many.
        """
        Q = check_rows(rows, self.codes, self.pages.keys.shape[1])
        if Q != self.group_size:
            raise ValueError(f"rows: expected groups of {self.group_size} codes, got {Q}")
        if any(row.slot == self.spare for row in rows):
            raise ValueError(f"rows: expected no request in the spare slot {self.spare}")
        bucket = self.cache.bucket_for(len(rows))
        inputs = self.static_inputs(bucket)
        inputs.fill(rows, self.prior.config.null_class, self.spare)
        drawn = self.cache.run("tokens", bucket, lambda: self.group(inputs.fields))
        return drawn[:, : len(rows)].T.clone(memory_format=torch.contiguous_format)

    def static_inputs(self, bucket: int) -> Inputs:
        """What the graph of a bucket reads; the same ones every time."""
        if bucket not in self._inputs:
            width = -(-self.codes.shape[1] // PAGE_SIZE)
            self._inputs[bucket] = Inputs(bucket, self.group_size, width, self.device)
        return self._inputs[bucket]

    def group(self, given: Fields) -> Tensor:
        """What is captured: Q codes `[Q, B]` of every request, written to the slots too."""
        B = len(given.seeds)
        idle = given.starts < 0
        positions = (given.starts + self._steps).masked_fill(idle, IDLE).to(torch.int32)  # [Q, R]
        places = (given.starts[:B] + self._steps).clamp_min(0)  # [Q, B]
        told = given.forced >= 0
        before = self.codes[given.slots, (given.starts[:B] - 1).clamp_min(0)]
        classes = F.embedding(given.labels, self.prior.class_embedding.weight)
        x = torch.where((given.starts == 0)[:, None], classes, self._embed(before))
        codes: list[Tensor] = []
        for step in range(self.group_size):
            if codes:
                x = self._embed(codes[-1])
            logits = decode_step_by_ops(
                self.weights, x, self.pages, given.table, positions[step], self.implementation
            )
            drawn = guided_sample(
                logits[:B], logits[B:], given.seeds, places[step],
                guidance_scale=given.guidance[step], temperature=given.temperature,
                top_k=given.top_k, top_p=given.top_p,
                implementation=self.implementation,
            )  # fmt: skip
            codes.append(torch.where(told[step], given.forced[step], drawn))
        out = torch.stack(codes)
        self.codes.index_put_((given.slots, places), out)
        return out

    def _embed(self, codes: Tensor) -> Tensor:
        """Inputs `[R, D]`: both rows of a request take its code."""
        return F.embedding(torch.cat((codes, codes)), self.prior.token_embedding.weight)

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first page of each pair to the second, in every layer.

        Raises:
            ValueError: where a page does not exist, or is the target of two pairs.
        """
        self.pages.copy(pairs)

    def report(self) -> list[GraphReport]:
        """The graphs captured so far."""
        return self.cache.report()

    @property
    def launches_per_token(self) -> float | None:
        """Kernels a code of the largest graph, where they were counted (`TapeCapture`).

        With Triton's ops: six a layer, and the head, the row lengths, the logits in fp32 unless
        they are, the draw, the choice between it and a forced code, a copy for the null rows and
        the embedding; and 15 once a group: 151.5 for prior L in bf16. An op counts as one; paged
        attention over so many pages that it splits them is two.
        """
        counts = [r.launches for r in self.report() if r.launches is not None]
        return max(counts) / self.group_size if counts else None


__all__ = ["GraphTokens", "Inputs"]
