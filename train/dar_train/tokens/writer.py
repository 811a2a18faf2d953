"""Writes a folder of tokens, chunk by chunk, so that it can be killed at any moment and go on.

A chunk's codes are on the disk before its line in the rank's `progress-*.jsonl` is, and its line
before the manifest that counts it. Ranks share the files and nothing else: chunk c is rank
c mod world's, and whoever finishes last puts the complete manifest in place.
"""

import json
import os
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dar_fast.files import atomic_write
from dar_train.tokens.manifest import (
    FILE,
    Manifest,
    Skipped,
    Spec,
    differences,
    read_manifest,
    write_manifest,
)

CODES, LABELS, HELD_OUT = "codes.npy", "labels.npy", "held_out.npy"
PROGRESS = "progress-*.jsonl"
NO_LABEL = -1  # of a picture that could not be read
FIRST_RANK_SECONDS = 600.0  # the others wait so long for its files
POLL_SECONDS = 0.1


class Line(NamedTuple):
    """A written chunk, as its rank's progress file names it."""

    checksum: int
    skipped: tuple[Skipped, ...]


def checksum(codes: NDArray[np.uint16], labels: NDArray[np.int32]) -> int:
    """CRC-32 of a chunk: codes [views, n, N], then labels [n]."""
    return zlib.crc32(labels.tobytes(), zlib.crc32(codes.tobytes()))


class Writer:
    """One rank's hand in a folder of tokens.

    Raises:
        ValueError: where the folder holds tokens of something else.
        RuntimeError: where the first rank does not put its files in place.
        OSError: where the folder cannot be written, or the disk is full.
    """

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        held_out: NDArray[np.bool_],
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = folder
        self.spec = spec
        self.rank = rank
        self.world = world
        if rank == 0:
            self._create(held_out)
        found = self._await_manifest()
        if different := differences(spec, found.spec):
            raise ValueError(
                f"tokens: {folder} holds others: {different}; name another folder, or remove it "
                "to encode anew"
            )
        self.complete = found.complete
        self._codes = _array(folder / CODES, np.dtype(np.uint16), spec.shape)
        self._labels = _array(folder / LABELS, np.dtype(np.int32), (spec.pictures,))
        self._done = {} if found.complete else self._intact()

    def _create(self, held_out: NDArray[np.bool_]) -> None:
        """Files of the whole size, so that a full disk is known at once; then the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        there = (self.folder / FILE).is_file()
        if not there or self.world == 1:  # else another rank may be writing one right now
            for name in (CODES, LABELS, HELD_OUT, FILE):
                for left in self.folder.glob(f".{name}.*"):  # of a run that was killed
                    left.unlink(missing_ok=True)
        if there:
            return
        for left in self.folder.glob(PROGRESS):
            left.unlink(missing_ok=True)
        _allocate(self.folder / CODES, np.dtype(np.uint16), self.spec.shape)
        _allocate(self.folder / LABELS, np.dtype(np.int32), (self.spec.pictures,))
        with atomic_write(self.folder / HELD_OUT) as temporary, temporary.open("wb") as file:
            np.save(file, held_out, allow_pickle=False)
        write_manifest(self.folder, Manifest(self.spec, complete=False))

    def _await_manifest(self) -> Manifest:
        deadline = time.monotonic() + FIRST_RANK_SECONDS
        while (found := read_manifest(self.folder)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"tokens: expected the first rank's {FILE} in {self.folder} within "
                    f"{FIRST_RANK_SECONDS:.0f} s, got none; is it a folder that all ranks share?"
                )
            time.sleep(POLL_SECONDS)
        return found

    def _mine(self, chunk: int) -> bool:
        return chunk % self.world == self.rank

    def _intact(self) -> dict[int, Line]:
        """This rank's chunks that some run has written, read back."""
        done = {}
        codes = np.load(self.folder / CODES, mmap_mode="r", allow_pickle=False)
        labels = np.load(self.folder / LABELS, mmap_mode="r", allow_pickle=False)
        for chunk, line in read_progress(self.folder).items():
            if self._mine(chunk) and chunk < self.spec.chunks:
                start, stop = self.spec.span(chunk)
                if checksum(codes[:, start:stop], labels[start:stop]) == line.checksum:
                    done[chunk] = line
        return done

    @property
    def remaining(self) -> list[int]:
        """Chunks that this rank has yet to write."""
        if self.complete:
            return []
        return [c for c in range(self.rank, self.spec.chunks, self.world) if c not in self._done]

    def write(
        self,
        chunk: int,
        codes: NDArray[np.uint16],
        labels: NDArray[np.int32],
        skipped: Sequence[Skipped] = (),
    ) -> None:
        """Put a chunk's codes [views, n, N] and labels [n] on the disk, then say so.

        Raises:
            OSError: where the disk is full.
        """
        start, _ = self.spec.span(chunk)
        self._codes.write([((view, start), part) for view, part in enumerate(codes)])
        self._labels.write([((start,), labels)])
        line = Line(checksum(codes, labels), tuple(skipped))
        record = {"chunk": chunk, "checksum": line.checksum, "skipped": line.skipped}
        _append(self.folder / f"progress-{self.rank:05d}.jsonl", json.dumps(record))
        self._done[chunk] = line

    def finish(self) -> bool:
        """Put the complete manifest in place where every rank's chunks are written."""
        if not self.complete:
            done = read_progress(self.folder) | self._done
            found = read_manifest(self.folder)
            if found is not None and found.complete:  # another rank was faster
                self.complete = True
            elif len(done) == self.spec.chunks:
                lines = [done[chunk] for chunk in range(self.spec.chunks)]
                skipped = tuple(sorted(skipped for line in lines for skipped in line.skipped))
                checksums = tuple(line.checksum for line in lines)
                write_manifest(self.folder, Manifest(self.spec, True, skipped, checksums))
                self.complete = True
        if self.complete:
            for file in self.folder.glob(PROGRESS):
                file.unlink(missing_ok=True)
        return self.complete


def read_progress(folder: Path) -> dict[int, Line]:
    """Chunks that any rank of any run says it has written; a torn last line is none."""
    done = {}
    for file in sorted(folder.glob(PROGRESS)):
        try:
            lines = file.read_bytes().split(b"\n")
        except FileNotFoundError:  # another rank has just finished
            continue
        for text in lines:
            try:
                record: dict[str, Any] = json.loads(text)
                skipped = tuple(Skipped(int(i), str(why)) for i, why in record["skipped"])
                done[int(record["chunk"])] = Line(int(record["checksum"]), skipped)
            except (ValueError, KeyError, TypeError):
                continue
    return done


def await_complete(folder: Path) -> None:
    """Wait until the other ranks have finished; torchrun ends this one where they fail."""
    while (found := read_manifest(folder)) is None or not found.complete:
        time.sleep(POLL_SECONDS)


class _Array(NamedTuple):
    """A .npy file that is written in place: a full disk raises, where a mapping would be killed."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    itemsize: int

    def write(self, parts: Sequence[tuple[tuple[int, ...], NDArray[Any]]]) -> None:
        """Write arrays, each from an index on, and wait for the disk."""
        handle = os.open(self.file, os.O_WRONLY)
        try:
            for where, part in parts:
                first = (*where, *[0] * (len(self.shape) - len(where)))
                place = self.offset + int(np.ravel_multi_index(first, self.shape)) * self.itemsize
                data = memoryview(part.tobytes())
                while data:
                    written = os.pwrite(handle, data, place)
                    data, place = data[written:], place + written
            os.fsync(handle)
        finally:
            os.close(handle)


def _array(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> _Array:
    """Where the elements of an existing file are.

    Raises:
        ValueError: where it is of another shape or type, or too short.
    """
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, FileNotFoundError) as error:
        raise ValueError(
            f"tokens: expected what dar tokenize wrote in {file}, got {type(error).__name__}: "
            f"{error}; remove the folder and run dar tokenize again"
        ) from error
    if not isinstance(mapped, np.memmap) or mapped.dtype != dtype or mapped.shape != shape:
        raise ValueError(
            f"tokens: expected {dtype} {list(shape)} in {file}, got {mapped.dtype} "
            f"{list(mapped.shape)}; remove the folder and run dar tokenize again"
        )
    return _Array(file, int(mapped.offset), shape, dtype.itemsize)


def _allocate(file: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    with atomic_write(file) as temporary:
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):  # Linux; elsewhere a full disk shows later
            with temporary.open("rb+") as opened:
                os.posix_fallocate(opened.fileno(), 0, temporary.stat().st_size)


def _append(file: Path, text: str) -> None:
    """One line more; what a killed run left half-written becomes a line of its own."""
    with file.open("ab+") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 1))
        torn = opened.read(1) not in (b"", b"\n")
        opened.write(b"\n" * torn + text.encode() + b"\n")
        opened.flush()
        os.fsync(opened.fileno())
