"""The folder of states: their names, pointers to them, one writer.

A state is a folder `step-<number>`; what a kill can leave behind has a temporary name and goes at
the next start.
"""

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dar_fast.files import atomic_write
from dar_train.checkpoints.manifest import check_state, fsync_folder, read_manifest

logger = logging.getLogger(__name__)

LOCK = ".lock"
STATE_NAME = re.compile(r"step-(\d{8,})(\.\d+)?")
POINTER_NAME = re.compile(r"[a-z][a-z0-9_]*")
LEFT_OVER = re.compile(r"\.step-\d{8,}(\.\d+)?\.(saving|dropped)")


class CheckpointError(RuntimeError):
    """The disk, the folder or another rank failed; what was saved before is still there."""


def serial_of(state: Path) -> int:
    """When among its folder's states one was saved; 0 where its manifest cannot be read."""
    try:
        return read_manifest(state).serial
    except ValueError:
        return 0


def step_of(state: Path) -> int:
    """The step in a state's name, or -1 where it is no state's name."""
    match = STATE_NAME.fullmatch(state.name)
    return int(match[1]) if match else -1


def states(folder: Path) -> list[Path]:
    """The states in `folder`, the newest first; those without a readable manifest last."""

    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=lambda state: (serial_of(state), step_of(state)), reverse=True)


def pointed(folder: Path, pointer: str) -> Path | None:
    """The state that `pointer` names, there or not; None where there is no such pointer.

    Raises:
        ValueError: where the pointer does not hold a state's name.
    """
    if not POINTER_NAME.fullmatch(pointer):
        raise ValueError(f"pointer: expected lower-case letters and digits, got {pointer!r}")
    try:
        name = (folder / pointer).read_bytes()[:256].decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"checkpoint: expected a readable {folder / pointer}, got {error}"
        ) from error
    if not STATE_NAME.fullmatch(name):
        raise ValueError(f"checkpoint: expected {folder / pointer} to name a state, got {name!r}")
    return folder / name


def point(folder: Path, pointer: str, state: Path) -> None:
    """Move a pointer: it names the old or the new state, whatever happens."""
    with atomic_write(folder / pointer) as temporary:
        temporary.write_text(state.name + "\n")
    fsync_folder(folder)


class Choices(NamedTuple):
    """States to resume from, the first choice first, and what was wrong before they were read."""

    folder: Path
    states: list[Path]
    wrong: list[str]


def candidates(folder: Path, pointer: str) -> Choices:
    """The pointer's own state, then the others, the newest first.

    For `latest` all others, for a pointer that marks a point of the run those of earlier steps.

    Raises:
        ValueError: where a pointer other than `latest` does not hold a state's name.
    """
    wrong: list[str] = []
    try:
        named = pointed(folder, pointer)
    except ValueError as error:
        if pointer != "latest":
            raise
        named, wrong = None, [str(error)]
    if named is None:
        return Choices(folder, states(folder) if pointer == "latest" else [], wrong)
    others = [state for state in states(folder) if state != named]
    if pointer != "latest":
        others = [state for state in others if step_of(state) < step_of(named)]
    return Choices(folder, [named, *others], wrong)


def first_intact(choices: Choices, check: Callable[[Path], None]) -> Path | None:
    """The first state that `check` lets pass; those before it are reported. None of none.

    Raises:
        ValueError: where something is wrong and no state is intact.
    """
    wrong = list(choices.wrong)
    for state in choices.states:
        try:
            check(state)
        except ValueError as error:
            wrong.append(str(error))
            continue
        for words in wrong:
            logger.warning("%s; taken instead: %s", words, state)
        return state
    if wrong:
        raise ValueError(
            f"checkpoint: expected an intact state in {choices.folder}, got: " + "; ".join(wrong)
        )
    return None


def find_intact(folder: Path, pointer: str = "latest") -> Path | None:
    """As `Checkpoints.find`, for one process that only reads: no lock, nothing written."""
    return first_intact(candidates(folder, pointer), check_state)


def named_states(folder: Path) -> set[str]:
    """Names of the states that some pointer holds."""
    names = set()
    for file in folder.iterdir():
        if POINTER_NAME.fullmatch(file.name) and file.is_file():
            names.add(file.read_bytes()[:256].decode(errors="replace").strip())
    return names


def drop(state: Path) -> None:
    """Remove a state; killed meanwhile, it has left its name already."""
    gone = state.with_name(f".{state.name}.dropped")
    shutil.rmtree(gone, ignore_errors=True)
    state.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def drop_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` newest states and those that a pointer names."""
    named = named_states(folder)
    for state in states(folder)[keep:]:
        if state.name not in named:
            drop(state)


def remove_left_overs(folder: Path) -> None:
    """Remove what a killed save or removal left behind."""
    for path in folder.iterdir():
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def probe(folder: Path) -> None:
    """Make `folder`, write there and remove it again.

    Raises:
        CheckpointError: where that does not go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: other ranks do the same
            file.write(b"written to see whether that goes\n")
    except OSError as error:
        raise CheckpointError(
            f"states: expected a folder that can be written, got {folder}: {error}"
        ) from error


class WriterLock:
    """One process at a time writes in a folder; a lock goes with its process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._file)

    def take(self) -> None:
        """Take the lock, or keep it; a process never locks itself out.

        Raises:
            CheckpointError: where another process has it: which one is said.
        """
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = self._path.read_text().strip() or "unknown"
            raise CheckpointError(
                f"states: expected no other run in {self._path.parent}, got process {owner}"
            ) from error
        except OSError as error:
            logger.warning(
                "no lock on %s, so mind that one run writes there: %s", self._path, error
            )
            return
        text = f"{os.getpid()} on {socket.gethostname()}\n".encode()
        with contextlib.suppress(OSError):  # on a full disk the lock holds without a name
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, text, 0)
