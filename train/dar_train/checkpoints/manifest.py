"""What a state consists of: a manifest of sizes and SHA-256 of its files, and a JSON record.

Checking a state reads all of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = 2
MANIFEST, RECORD = "manifest.json", "state.json"
FILE_NAME = re.compile(r"state\.json|(model|averaged|extra|optimizer-\d+)\.\d+\.safetensors")


class Entry(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """What a state consists of, and when among its folder's states it was saved."""

    serial: int
    files: dict[str, Entry]


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe(file: Path) -> Entry:
    """Size and hash of a file, read in a stream."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return Entry(stream.tell(), digest)


def _lines(body: dict[str, Any]) -> str:
    text = json.dumps(body, indent=1, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()}) + "\n" + text + "\n"


def write_synced(file: Path, text: str) -> None:
    """Write a new file; it is on disk when this returns."""
    with file.open("x", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_manifest(state: Path, serial: int, files: Mapping[str, Entry]) -> None:
    """Write what makes a folder a state; its first line is the hash of the rest."""
    entries = {name: entry._asdict() for name, entry in files.items()}
    body = {"format": FORMAT, "serial": serial, "files": entries}
    write_synced(state / MANIFEST, _lines(body))


def is_first_format(state: Path) -> bool:
    """Whether a state is of the format that had no manifest."""
    try:
        return not (state / MANIFEST).exists() and read_record(state).get("format") == 1
    except ValueError:
        return False


def read_manifest(state: Path) -> Manifest:
    """The manifest of a state.

    Raises:
        ValueError: where it is missing, damaged, or of another format.
    """
    file = state / MANIFEST
    try:
        text = file.read_bytes().decode()
        body = json.loads(text.partition("\n")[2])
        if _lines(body) != text:
            raise ValueError("text that does not fit its hash")
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}")
        files = {name: Entry(**entry) for name, entry in body["files"].items()}
        if not all(FILE_NAME.fullmatch(name) for name in files) or RECORD not in files:
            raise ValueError(f"files {sorted(files)}")
        return Manifest(int(body["serial"]), files)
    except FileNotFoundError as error:
        if is_first_format(state):
            raise ValueError(
                f"checkpoint: expected format {FORMAT}, got {state} of format 1: its weights can "
                "be read (read_weights), training cannot go on from it"
            ) from error
        raise ValueError(f"checkpoint: expected a state with a manifest, got {state}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"checkpoint: expected a manifest of format {FORMAT} in {file}, got {error}"
        ) from error


def read_record(state: Path) -> dict[str, Any]:
    """The JSON part of a state.

    Raises:
        ValueError: where it is unreadable.
    """
    try:
        record = json.loads((state / RECORD).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: expected JSON in {state / RECORD}, got {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"checkpoint: expected a table in {state / RECORD}, got {type(record)}")
    return record


def check_files(state: Path, files: Mapping[str, Entry], names: Iterable[str]) -> None:
    """Read the named files.

    Raises:
        ValueError: where one is missing or is not what the manifest says.
    """
    for name in names:
        try:
            found = describe(state / name)
        except OSError as error:
            raise ValueError(f"checkpoint: expected {state / name}, got {error}") from error
        if found != files[name]:
            raise ValueError(
                f"checkpoint: expected {state / name} of {files[name].bytes} bytes with SHA-256 "
                f"{files[name].sha256[:12]}…, got {found.bytes} bytes with {found.sha256[:12]}…"
            )


def check_state(state: Path) -> None:
    """Read all of a state.

    Raises:
        ValueError: where it is missing, damaged, or of another format.
    """
    files = read_manifest(state).files
    check_files(state, files, files)
