"""Parts of the endless stream of samples, from the device's memory or through reading processes.

A resident set costs one gather a batch. Others are read ahead of the training and copied beside it:
3·R² bytes a picture, through pinned memory on a stream of its own.
"""

import signal
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dar_train.data.reading import Piece, Reader, ReadingError, flips
from dar_train.data.source import UnreadableError

PIECE = 32  # pictures that a worker hands over at once
AHEAD = 4  # pieces that every worker keeps ready
GRACE = 10  # seconds that a worker goes on after SIGTERM, for a run that stops cleanly


class Feed(Protocol):
    """Reads any part of the endless stream; `take` is asked for neighbouring parts."""

    def take(self, positions: range) -> tuple[Tensor, Tensor]: ...
    def close(self) -> None: ...


class Skipped:
    """Each unreadable sample once."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._new: list[str] = []

    def add(self, found: Sequence[tuple[int, str]]) -> None:
        for index, text in found:
            if index not in self._known:
                self._known.add(index)
                self._new.append(text)

    def pop(self) -> list[str]:
        new, self._new = self._new, []
        return new


class Resident:
    """All training pictures on the device."""

    def __init__(self, reader: Reader, device: torch.device, skipped: Skipped) -> None:
        self.reader = reader
        self.device = device
        self.rows = torch.full((len(reader.pictures),), -1, dtype=torch.int64)  # of an index
        images, labels = list[Tensor](), list[int]()
        for index in reader.pictures.train.tolist():
            try:
                image, label = reader.read(index, None)
            except UnreadableError as error:
                skipped.add([(index, f"{reader.pictures.name(index)}: {error}")])
                continue
            self.rows[index] = len(images)
            images.append(image)
            labels.append(label)
        if not images:
            raise ReadingError(f"data: expected readable pictures, got none; {skipped.pop()[0]}")
        self.images = torch.stack(images).to(device)
        self.labels = torch.tensor(labels, dtype=torch.int64).to(device)

    def _row(self, position: int) -> int:
        """Of the first readable sample from `position` on; there is one."""
        while True:
            row = int(self.rows[self.reader.order.take(position, 1)])
            if row >= 0:
                return row
            position += 1

    def take(self, positions: range) -> tuple[Tensor, Tensor]:
        first, count = positions.start, len(positions)
        rows = self.rows[self.reader.order.take(first, count)]
        for place in (rows < 0).nonzero().flatten().tolist():
            rows[place] = self._row(first + place)
        rows = _sent(rows, self.device)
        images = self.images[rows]
        if self.reader.flip:
            mirrored = _sent(flips(self.reader.seed, first, count), self.device)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, self.labels[rows]

    def close(self) -> None:
        return None


class _Walk:
    """Ranges of this rank's positions, batch by batch, without end."""

    def __init__(self, first: int, count: int, stride: int) -> None:
        self.first, self.count, self.stride = first, count, stride

    def __iter__(self) -> Iterator[range]:
        first = self.first
        while True:
            for start in range(first, first + self.count, PIECE):
                yield range(start, min(start + PIECE, first + self.count))
            first += self.stride


class Loaded:
    """Pictures read by `workers` processes; from a new place they start anew."""

    def __init__(
        self, reader: Reader, device: torch.device, skipped: Skipped, workers: int, batch: int
    ) -> None:
        self.reader = reader
        self.device = device
        self.skipped = skipped
        self.workers = workers
        self.batch = batch  # of all ranks: from one of ours to the next
        self._pieces: Any = None
        self._next: range | None = None
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _start(self, positions: range) -> None:
        self.close()
        context = None
        if self.workers:
            # forked from a process without threads or a device, which loads torch once for all
            context = get_context("forkserver")
            context.set_forkserver_preload([__name__])
        loader = DataLoader(
            self.reader, batch_size=None, num_workers=self.workers, collate_fn=_as_it_is,
            sampler=_Walk(positions.start, len(positions), self.batch),
            prefetch_factor=AHEAD if self.workers else None,
            pin_memory=self.device.type == "cuda", multiprocessing_context=context,
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # else it draws from the run's own
        )  # fmt: skip
        self._pieces = iter(loader)

    def _piece(self) -> Piece:
        try:
            piece: Piece = next(self._pieces)
        except (RuntimeError, OSError, EOFError) as error:
            how = ends(self._pieces)
            if not how:
                raise
            self.close()
            raise ReadingError(
                f"workers: expected {self.workers} processes that read pictures, got {how}; fewer "
                f"--workers need less memory; the run resumes from its last state"
            ) from error
        self.skipped.add(piece.skipped)
        if piece.failure is not None:
            self.close()
            raise piece.failure
        return piece

    def take(self, positions: range) -> tuple[Tensor, Tensor]:
        if self._pieces is None or self._next != positions:
            self._start(positions)
        pieces = [self._piece() for _ in range(0, len(positions), PIECE)]
        self._next = range(positions.start + self.batch, positions.stop + self.batch)
        if self._copies is None:
            images = torch.cat([piece.images for piece in pieces])
            return images, torch.cat([piece.labels for piece in pieces])
        with torch.cuda.stream(self._copies):  # beside what the device is computing
            images = torch.cat([p.images.to(self.device, non_blocking=True) for p in pieces])
            labels = torch.cat([p.labels.to(self.device, non_blocking=True) for p in pieces])
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        for tensor in (images, labels):
            tensor.record_stream(current)
        return images, labels

    def close(self) -> None:
        pieces, self._pieces, self._next = self._pieces, None, None
        stop_workers(pieces)


def _as_it_is(piece: Any) -> Any:
    return piece


def prepare_worker(worker: int) -> None:
    """Signals to the whole group are the run's own matter, which saves and then ends the workers.

    SIGTERM alone still ends one in the end: so does a process that exits without closing them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE))


def stop_workers(pieces: Any) -> None:
    """End the workers of a DataLoader's iterator now, if it has any.

    One that the garbage collector finds closes its queues first: each worker then takes GRACE.
    """
    stop = getattr(pieces, "_shutdown_workers", None)
    if stop is not None:
        stop()


def ends(pieces: Any) -> str:
    """How the workers that died did; empty where all live."""
    ends = []
    for worker, process in enumerate(getattr(pieces, "_workers", ())):
        code = process.exitcode
        if code is None:
            continue
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        ends.append(f"worker {worker} (process {process.pid}) ended by {how}")
    return ", ".join(ends)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
