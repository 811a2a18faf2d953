"""Encodes a data set into a folder of tokens: views of pictures in, codes out.

One pass of the tokenizer's encoder a picture and view; workers read and crop meanwhile. Pictures of
a chunk are encoded in the same batches of one size whoever does it, so codes do not depend on how
many ranks there are or where a run was killed.
"""

import hashlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dar_fast.checkpoint import load_model
from dar_fast.models.tokenizer import Tokenizer
from dar_train.data import PictureSet, ReadingError, UnreadableError, to_float
from dar_train.data.feeds import ends, prepare_worker, stop_workers
from dar_train.data.source import check_label, check_labels
from dar_train.distributed import Ranks
from dar_train.tokens.manifest import Precision, Skipped, Spec, View
from dar_train.tokens.pictures import viewed
from dar_train.tokens.writer import NO_LABEL, Writer

BATCH = 128  # pictures
PIECE = 16  # pictures that a worker hands over at once
AHEAD = 2  # pieces that every worker keeps ready


class Piece(NamedTuple):
    """Neighbouring pictures, read."""

    images: Tensor  # uint8 [n, views, 3, R, R]; zeros where a picture could not be read
    labels: Tensor  # int32 [n]
    skipped: list[tuple[int, str]]  # picture, and name with reason
    failure: Exception | None = None  # why there are no further samples


class Progress(NamedTuple):
    """How far this rank is."""

    chunk: int  # written in this call
    chunks: int  # to write in this call
    pictures: int  # encoded in this call
    encodings: int  # pictures times views
    seconds: float
    skipped: int


class Pieces(Dataset[Piece]):
    """Spans of pictures under every view; runs in the workers."""

    def __init__(
        self, pictures: PictureSet, spec: Spec, size: int, spans: Sequence[tuple[int, int]]
    ) -> None:
        self.pictures = pictures
        self.spec = spec
        self.size = size
        self.spans = spans

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Piece:
        start, stop = self.spans[index]
        views, size = self.spec.views, self.size
        images = torch.zeros(stop - start, len(views), 3, size, size, dtype=torch.uint8)
        labels = torch.full((stop - start,), NO_LABEL, dtype=torch.int32)
        skipped = []
        for row, picture in enumerate(range(start, stop)):
            name = self.pictures.name(picture)
            try:
                seen = viewed(self.pictures, picture, views, size, self.spec.seed)
                check_label(seen.label, self.spec.classes, name)
            except UnreadableError as error:
                skipped.append((picture, f"{name}: {error}"))
                continue
            except (ValueError, ReadingError) as error:  # told by whoever asked, without a trace
                return Piece(images, labels, skipped, error)
            images[row], labels[row] = seen.images, seen.label
        return Piece(images, labels, skipped)


def load_tokenizer(folder: Path, device: torch.device) -> Tokenizer:
    """The trained tokenizer in `folder`, in fp32, to encode and decode only.

    Raises:
        ValueError: where the folder holds something else.
        CheckpointError: where a file is missing or damaged.
    """
    model = load_model(folder, device=device, dtype=torch.float32)
    if not isinstance(model, Tokenizer):
        raise ValueError(f"tokenizer: expected a tokenizer in {folder}, got {type(model).__name__}")
    return model.eval().requires_grad_(False)


def spec_of(
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    pictures: PictureSet,
    *,
    views: Sequence[View],
    seed: int = 0,
    precision: Precision = "fp32",
    batch: int = BATCH,
) -> Spec:
    """What the tokens of `pictures` will be.

    Raises:
        ValueError: where the codebook does not fit 16 bits, or a number is out of its range.
    """
    return Spec(
        tokenizer=tokenizer_hash,
        data=pictures.fingerprint,
        label_names=tuple(pictures.label_names),
        pictures=len(pictures),
        tokens=tokenizer.config.num_tokens,
        codebook_size=tokenizer.config.codebook_size,
        views=tuple(views),
        held_out=hashlib.sha256(_held_out(pictures).tobytes()).hexdigest(),
        seed=seed,
        precision=precision,
        batch=batch,
    )


def _held_out(pictures: PictureSet) -> NDArray[np.bool_]:
    mask = np.zeros(len(pictures), dtype=np.bool_)
    mask[pictures.held_out.numpy()] = True
    return mask


def write_tokens(
    folder: Path,
    tokenizer: Tokenizer,
    pictures: PictureSet,
    spec: Spec,
    ranks: Ranks,
    *,
    workers: int = 0,
    report: Callable[[Progress], None] | None = None,
) -> bool:
    """Encode this rank's chunks that are still missing; True where the folder is complete then.

    Args:
        workers: processes that read pictures; 0: none.
        report: called after every chunk.

    Raises:
        ValueError: where the folder holds tokens of something else, or a label is out of range.
        ReadingError: where a worker dies.
        OSError: where the folder cannot be written, or the disk is full.
    """
    check_labels(pictures, spec.classes)
    writer = Writer(folder, spec, _held_out(pictures), rank=ranks.rank, world=ranks.world)
    todo = writer.remaining
    began, count, skipped = time.monotonic(), 0, 0
    size = tokenizer.config.image_size
    with closing(_pieces(pictures, spec, size, todo, ranks, workers)) as pieces:
        for done, chunk in enumerate(todo, 1):
            start, stop = spec.span(chunk)
            codes, labels, missing = _encode(
                tokenizer, spec, start, _until(pieces, stop - start), ranks
            )
            writer.write(chunk, codes, labels, missing)
            count, skipped = count + stop - start, skipped + len(missing)
            if report is not None:
                seconds = time.monotonic() - began
                encodings = count * len(spec.views)
                report(Progress(done, len(todo), count, encodings, seconds, skipped))
    return writer.finish()


def _pieces(
    pictures: PictureSet,
    spec: Spec,
    size: int,
    chunks: Sequence[int],
    ranks: Ranks,
    workers: int,
) -> Generator[Piece, None, None]:
    """The pictures of `chunks`, in order, read ahead by the workers."""
    spans = []
    for start, stop in map(spec.span, chunks):
        spans += [(first, min(first + PIECE, stop)) for first in range(start, stop, PIECE)]
    workers = min(workers, len(spans))
    context = None
    if workers:
        context = get_context("forkserver")  # a process without threads or a device is forked
        context.set_forkserver_preload([__name__])
    loader = DataLoader(
        Pieces(pictures, spec, size, spans), batch_size=None, num_workers=workers,
        collate_fn=_as_it_is, prefetch_factor=AHEAD if workers else None,
        pin_memory=ranks.device.type == "cuda", multiprocessing_context=context,
        worker_init_fn=prepare_worker, generator=torch.Generator(),
    )  # fmt: skip
    pieces = iter(loader)
    try:
        for piece in pieces:
            if piece.failure is not None:
                raise piece.failure
            yield piece
    except (RuntimeError, OSError, EOFError) as error:
        how = ends(pieces)
        if not how:
            raise
        raise ReadingError(
            f"workers: expected {workers} processes that read pictures, got {how}; out of "
            "memory? fewer --workers need less; a rerun goes on where this one stopped"
        ) from error
    finally:
        stop_workers(pieces)


def _as_it_is(piece: Any) -> Any:
    return piece


def _until(pieces: Iterator[Piece], pictures: int) -> Iterator[Piece]:
    """The pieces of the next `pictures`."""
    while pictures > 0:
        piece = next(pieces)
        pictures -= len(piece.labels)
        yield piece


def _encode(
    tokenizer: Tokenizer, spec: Spec, start: int, pieces: Iterator[Piece], ranks: Ranks
) -> tuple[NDArray[np.uint16], NDArray[np.int32], list[Skipped]]:
    """Codes [views, n, N] and labels [n] of one chunk."""
    labels, missing, codes = [], list[Skipped](), []
    waiting: Tensor | None = None
    for piece in pieces:
        labels.append(piece.labels)
        missing += [Skipped(*skipped) for skipped in piece.skipped]
        images = piece.images.flatten(0, 1).to(ranks.device, non_blocking=True)
        waiting = images if waiting is None else torch.cat((waiting, images))
        while len(waiting) >= spec.batch:
            codes.append(_batch(tokenizer, waiting[: spec.batch], spec, ranks))
            waiting = waiting[spec.batch :]
    if waiting is not None and len(waiting):
        codes.append(_batch(tokenizer, waiting, spec, ranks))
    every = torch.cat(labels).numpy()
    found = torch.cat(codes).cpu().numpy().astype(np.uint16)  # the one wait for the device
    found = found.reshape(len(every), len(spec.views), spec.tokens)
    found[[skipped.picture - start for skipped in missing]] = 0
    return np.ascontiguousarray(found.transpose(1, 0, 2)), every, missing


def _batch(tokenizer: Tokenizer, images: Tensor, spec: Spec, ranks: Ranks) -> Tensor:
    """Codes int64 [n, N] of images uint8 [n, 3, R, R], encoded as one full batch."""
    padding = spec.batch - len(images)
    if padding:
        images = torch.cat((images, images.new_zeros(padding, *images.shape[1:])))
    with torch.autocast(ranks.device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
        return tokenizer.encode(to_float(images))[: spec.batch - padding]
