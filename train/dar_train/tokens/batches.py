"""Batches of codes for the prior: each training picture once an epoch, under a drawn view.

Order and views are functions of (seed, position), so any number of ranks, resumed anywhere, reads
the samples of an uninterrupted run. Moves 2·N bytes a sample to the device, or none where the
whole store fits there; the next batch is read while the step before it runs.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dar_train.data import Order, derived_seed, uniforms
from dar_train.distributed import Ranks
from dar_train.tokens.store import Store

RESIDENT_BYTES = 1 << 30  # stores up to this size stay on the accelerator
VIEW_STREAM = 9  # of a seed
SIGN = 0xFFFF  # codes travel as int16, which every operation knows; this undoes its sign


class CodeBatch(NamedTuple):
    """Samples of the prior's training."""

    codes: Tensor  # int64 [b, N]
    labels: Tensor  # int64 [b]


class Samples(NamedTuple):
    """Which codes a batch is of, on the host."""

    views: Tensor  # int64 [b]
    pictures: Tensor  # int64 [b]


class CodeOrder:
    """Training pictures and their views by global position; needs no state."""

    def __init__(self, pictures: Tensor, views: int, seed: int) -> None:
        self.order = Order(pictures, seed)
        self.views = views
        self.seed = derived_seed(seed, VIEW_STREAM)

    def take(self, position: int, count: int) -> Samples:
        """The `count` samples from global `position` on."""
        views = (uniforms(self.seed, position, count, 1)[:, 0] * self.views).astype(np.int64)
        return Samples(torch.from_numpy(views), self.order.take(position, count))


class CodeBatches:
    """`Batches[CodeBatch]` over a store; see `code_batches`."""

    def __init__(self, store: Store, order: CodeOrder, batch: int, ranks: Ranks) -> None:
        self.store = store
        self.order = order
        self.batch = batch
        self.ranks = ranks
        self.position = 0
        self._cuda = ranks.device.type == "cuda"
        self._table: Tensor | None = None  # int16 [views, M, N]
        self._table_labels: Tensor | None = None
        if self._cuda and store.codes.nbytes <= RESIDENT_BYTES:
            self.make_resident()
        self._reader = ThreadPoolExecutor(1, "codes", self._use_device)
        self._ahead: Future[tuple[Tensor, ...]] | None = None

    def _use_device(self) -> None:
        """Pin memory for this rank's device: a thread of its own would take the first one."""
        if self._cuda:
            torch.cuda.set_device(self.ranks.device)

    def make_resident(self) -> None:
        """Keep all codes on the device: 2·views·M·N bytes. For the time before the first batch."""
        table = torch.from_numpy(self.store.codes.view(np.int16).copy())
        self._table = table.to(self.ranks.device)
        self._table_labels = self.store.labels.to(self.ranks.device)

    def _read(self, position: int) -> tuple[Tensor, ...]:
        """This rank's part of the batch at `position`, on the host, pinned for an accelerator."""
        each = self.batch // self.ranks.world
        where = self.order.take(position + self.ranks.rank * each, each)
        host: tuple[Tensor, ...] = where
        if self._table is None:
            codes = self.store.codes[where.views.numpy(), where.pictures.numpy()]
            host = (torch.from_numpy(codes.view(np.int16)), self.store.labels[where.pictures])
        return tuple(tensor.pin_memory() for tensor in host) if self._cuda else host

    def next(self) -> CodeBatch:
        """This rank's samples of the next optimizer batch, on the device."""
        ahead = self._ahead or self._reader.submit(self._read, self.position)
        host = ahead.result()
        self.position += self.batch
        self._ahead = self._reader.submit(self._read, self.position)
        first, second = (tensor.to(self.ranks.device, non_blocking=True) for tensor in host)
        if self._table is not None and self._table_labels is not None:
            first, second = self._table[first, second], self._table_labels[second]
        return CodeBatch(first.to(torch.int64) & SIGN, second)

    def state_dict(self) -> dict[str, Any]:
        """Where it is: samples read by all ranks together, and of which codes."""
        return {"position": self.position, "fingerprint": self.store.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: where the state is that of other codes.
        """
        mine = self.store.fingerprint
        if state["fingerprint"] != mine:
            raise ValueError(
                f"tokens: expected {state['fingerprint'][:12]}, on which this run was trained, "
                f"got {mine[:12]} in {self.store.folder}; name the same tokens, or another --out"
            )
        self.position = int(state["position"])
        self._ahead = None

    def skipped(self) -> Sequence[str]:
        """None: what could not be read was left out when the codes were made."""
        return ()

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def code_batches(store: Store, *, batch: int, seed: int, ranks: Ranks) -> CodeBatches:
    """Endless batches of `batch` samples over all ranks, of the store's training pictures.

    Raises:
        ValueError: where the ranks do not divide the batch.
    """
    if batch < 1 or batch % ranks.world:
        raise ValueError(
            f"batch: expected a positive multiple of the {ranks.world} ranks, got {batch}"
        )
    order = CodeOrder(store.train, len(store.spec.views), seed)
    return CodeBatches(store, order, batch, ranks)
