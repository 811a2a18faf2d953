"""Training states that survive kills, full disks and other numbers of ranks.

A state is written under a temporary name by all ranks, synced, described by a manifest of hashes,
then renamed; pointers to it move last. Killed at any instant, the pointer names an intact state.
With AdamW a save writes 4 numbers a parameter once over all ranks, and reads them again to hash.
"""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from dar_train.checkpoints import folder as disk
from dar_train.checkpoints import manifest
from dar_train.checkpoints.folder import CheckpointError
from dar_train.checkpoints.manifest import FORMAT, RECORD, Entry
from dar_train.checkpoints.shards import Shards, Slice, plan_save, staged, write_slices
from dar_train.checkpoints.tensors import TrainState, restore, targets, tensors_of
from dar_train.distributed import Ranks

logger = logging.getLogger(__name__)

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # between the first and the last rank's word that it has written
SPARE_BYTES = 1 << 20  # for headers, the record and the manifest


class Checkpoints:
    """The states of one run under `folder`, which all ranks share and one run writes.

    The `keep` newest stay, and all that a pointer names. An `asynchronous` save copies the tensors
    to the host and returns; a thread writes them, and its failure is raised by the next call.
    All methods are called by all ranks alike, and where one rank fails, all raise what it says.

    Raises:
        CheckpointError: where the folder cannot be written, or another process writes there.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int = 2, asynchronous: bool = False
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected an integer >= 1, got {keep}")
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self.last: Path | None = None
        self._buffers: dict[str, Tensor] | None = {} if asynchronous else None
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._checked: Path | None = None
        self._group: dist.ProcessGroup | None = None
        if ranks.world > 1:
            if not dist.is_initialized():
                raise CheckpointError(f"states: expected a process group of {ranks.world} ranks")
            # of its own, as the writing thread talks while the loop exchanges gradients
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._lock: disk.WriterLock | None = None
        self._together(self._open if ranks.first else disk.probe, folder)

    def _open(self, folder: Path) -> None:
        disk.probe(folder)
        self._lock = disk.WriterLock(folder)
        self._lock.take()
        disk.remove_left_overs(folder)

    def _gather(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.ranks.world
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise CheckpointError(f"states: a rank is gone: {error}") from error
        return values

    def _together(self, work: Callable[..., T], *arguments: Any) -> list[T]:
        """Every rank's result of `work`; where one fails, all raise."""
        result, failure = None, None
        try:
            result = work(*arguments)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            failure = error
        if self._group is None:
            if failure is not None:
                raise failure
            return [result]  # type: ignore[list-item]
        words = None if failure is None else (isinstance(failure, ValueError), str(failure))
        answers = self._gather((result, words))
        failed = [(rank, words) for rank, (_, words) in enumerate(answers) if words is not None]
        if failed:
            text = "; ".join(f"rank {rank}: {words[1]}" for rank, words in failed)
            kind = ValueError if all(words[0] for _, words in failed) else CheckpointError
            raise kind(text) from failure
        return [result for result, _ in answers]

    def save(
        self,
        step: int,
        weights: TrainState,
        record: dict[str, Any],
        *,
        pointers: Sequence[str] = ("latest",),
    ) -> Path:
        """Save a state of `step` >= 0 with `record`, plain JSON; then move `pointers`, latest last.

        Returns its folder, which an asynchronous save has yet to write.

        Raises:
            CheckpointError: where this or the last asynchronous save failed; states that were
                there before still are, and the last one is named.
            TypeError: where `record` is no plain JSON.
        """
        self.wait()
        text = json.dumps({**record, "step": step, "format": FORMAT}, indent=1) + "\n"
        if step < 0 or not all(disk.POINTER_NAME.fullmatch(pointer) for pointer in pointers):
            raise ValueError(f"save: expected a step >= 0 and plain names, got {step}, {pointers}")
        try:
            planned = plan_save(tensors_of(weights), self.ranks.rank, self._gather)
            mine = sum(piece.data.numel() * piece.data.element_size() for piece in planned)
            needed = sum(self._gather(mine)) + SPARE_BYTES
            slices: list[Slice] = []
            self._together(lambda: slices.extend(staged(planned, self._buffers)))
            state = self.folder / self._together(self._prepare, step, needed)[0]
        except (OSError, RuntimeError) as error:
            raise self._not_saved(step, error) from error
        if self._buffers is None:
            self._write(state, slices, text, pointers)
        else:
            self._thread = threading.Thread(
                target=self._write_quietly, args=(state, slices, text, pointers), name="checkpoint"
            )
            self._thread.start()
        return state

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        last = self.last or "none (nothing was saved yet)"
        return CheckpointError(f"step {step} was not saved: {error}; the last good state is {last}")

    def _prepare(self, step: int, needed: int) -> str:
        """The first rank looks for room and makes the temporary folder; the state's name."""
        if not self.ranks.first:
            return ""
        if self._lock is not None:
            self._lock.take()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder} has {free / 1e6:,.1f} MB free of the {needed / 1e6:,.1f} MB needed"
            )
        name = plain = f"step-{step:08d}"
        taken, copies = disk.named_states(self.folder), 0
        while name in taken:  # a pointer names it: it stays until the pointer has moved
            copies += 1
            name = f"{plain}.{copies}"
        temporary = _temporary(self.folder / name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return name

    def _write_quietly(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except CheckpointError as error:
            self._failure = error

    def _write(self, state: Path, slices: list[Slice], text: str, pointers: Sequence[str]) -> None:
        temporary = _temporary(state)
        try:
            described = self._together(self._write_mine, temporary, slices)
            files = {name: entry for part in described for name, entry in part.items()}
            self._together(self._publish, state, text, files, pointers)
        except Exception as error:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise self._not_saved(disk.step_of(state), error) from error
        except BaseException:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.last = self._checked = state

    def _write_mine(self, temporary: Path, slices: list[Slice]) -> dict[str, Entry]:
        if not temporary.is_dir():
            raise CheckpointError(f"expected a folder that all ranks share, got {self.folder}")
        files = write_slices(temporary, self.ranks.rank, slices)
        return {file.name: manifest.describe(file) for file in files}

    def _publish(
        self, state: Path, text: str, files: dict[str, Entry], pointers: Sequence[str]
    ) -> None:
        if not self.ranks.first:
            return
        temporary = _temporary(state)
        manifest.write_synced(temporary / RECORD, text)
        files[RECORD] = manifest.describe(temporary / RECORD)
        serial = 1 + max((disk.serial_of(other) for other in disk.states(self.folder)), default=0)
        manifest.write_manifest(temporary, serial, files)
        manifest.fsync_folder(temporary)
        if state.exists():  # of a save that was killed before its pointer moved
            disk.drop(state)
        temporary.rename(state)
        manifest.fsync_folder(self.folder)
        for pointer in sorted(pointers, key=lambda name: name == "latest"):
            disk.point(self.folder, pointer, state)
        disk.drop_old(self.folder, self.keep)

    def wait(self) -> None:
        """Until what is being saved is on disk.

        Raises:
            CheckpointError: where it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def find(self, pointer: str = "latest") -> Path | None:
        """The state that `pointer` names, or where that is damaged the newest intact one before.

        Reads all of it to compare hashes. None where nothing was saved.

        Raises:
            ValueError: where states are there and none is intact: what is wrong with each is said.
        """
        self.wait()
        choices = self._together(disk.candidates, self.folder, pointer)[0]
        return disk.first_intact(choices, self._check)

    def _check(self, state: Path) -> None:
        """Compare all files with the manifest, each rank some of them."""
        files = self._together(manifest.read_manifest, state)[0].files
        mine = sorted(files)[self.ranks.rank :: self.ranks.world]
        self._together(manifest.check_files, state, files, mine)
        self._checked = state

    def load(self, state: Path, weights: TrainState) -> dict[str, Any]:
        """Restore tensors in place, saved by any number of ranks, and return the record.

        Raises:
            ValueError: where the state is damaged, of another format, or of another model or other
                optimizers: nothing has changed then.
        """
        self.wait()
        if self._checked != state:
            self._check(state)
        record = self._together(self._load_mine, state, weights)[self.ranks.rank]
        self.last = state
        return record

    def _load_mine(self, state: Path, weights: TrainState) -> dict[str, Any]:
        names = [name for name in manifest.read_manifest(state).files if name != RECORD]
        with Shards([state / name for name in sorted(names)]) as shards:
            tensors = targets(weights, shards.tensors)
            shards.read(tensors)
        restore(weights, tensors)
        return manifest.read_record(state)


def _temporary(state: Path) -> Path:
    return state.with_name(f".{state.name}.saving")
