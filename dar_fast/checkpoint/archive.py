"""The zip archive around an official `.pt` file, mapped and never unpacked.

torch stores every member uncompressed, so a member is a byte range of the file; opening costs one
pass over the central directory (about 10 µs a member), whatever the size of the weights. Accepted
is what `torch.save` writes and no more: one root folder, stored members, ranges that lie in the
file and do not overlap. Layout: PKWARE APPNOTE 6.3, §4.3.
"""

import itertools
import mmap
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from dar_fast.checkpoint.errors import CheckpointError, Limits

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x2041  # bits 0, 6 and 13
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # LONG1 of torch < 1.6's number
_RESAVE = (
    "load it once with the torch that wrote it, in a place where its code may run, "
    "and torch.save the state dict"
)


class Member(NamedTuple):
    """One stored file: bytes [start, start + size) of the archive."""

    start: int
    size: int
    crc: int  # 0: not recorded (torch.serialization.set_crc32_options(False))


class Archive:
    """The members of a torch archive by name below its root folder, over a private mapping.

    The mapping is copy-on-write: tensors over it may be written, the file never changes. It lives
    as long as the tensors do. A file that somebody truncates while it is mapped kills the process
    at the next read, as with any mapping.

    Raises:
        CheckpointError: where the file is no such archive or is inconsistent.
        OSError: where the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits) -> None:
        with Path(path).open("rb") as file:
            self.file_size = os.fstat(file.fileno()).st_size
            if self.file_size == 0:
                raise CheckpointError("expected a torch zip archive, got an empty file")
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if self.mapping[:2] != b"PK":
            raise CheckpointError(_what_else(self.mapping[:64]))
        self.members = _read_members(self.mapping, self.file_size, limits)
        _check_kind(self)

    def read(self, name: str) -> bytes:
        """The checked content of a small member."""
        member = self.members[name]
        data = self.mapping[member.start : member.start + member.size]
        if member.crc and zlib.crc32(data) != member.crc:
            raise CheckpointError(f"damaged: checksum of {name} does not match")
        return data

    def verify(self) -> None:
        """Check every member's checksum: reads the whole file, about 1 GB/s."""
        with memoryview(self.mapping) as view:
            for name, member in self.members.items():
                if (
                    member.crc
                    and _crc(view[member.start : member.start + member.size]) != member.crc
                ):
                    raise CheckpointError(f"damaged: checksum of {name} does not match")


def _crc(view: memoryview) -> int:
    with view:
        return zlib.crc32(view)


def _what_else(head: bytes) -> str:
    if _LEGACY_MAGIC in head:
        return f"legacy (non-zip) torch.save format is not read: {_RESAVE}"
    if head[257:262] == b"ustar" or head[:1] == b"\x80":
        return f"expected a torch zip archive, got a bare pickle, which is not read: {_RESAVE}"
    return f"expected a torch zip archive, got a file that starts with {head[:8]!r}"


def _check_kind(archive: Archive) -> None:
    names = archive.members
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise CheckpointError(f"TorchScript archives carry code and are not read: {_RESAVE}")
    if "data.pkl" not in names:
        raise CheckpointError("expected a member data.pkl in the archive, found none")
    if "byteorder" in names and archive.read("byteorder") != b"little":
        raise CheckpointError(
            f"expected little-endian storages, got byteorder {archive.read('byteorder')[:16]!r}"
        )


class _Directory(NamedTuple):
    entries: int
    start: int
    size: int
    end: int  # where it must stop


def _find_directory(data: mmap.mmap, size: int) -> _Directory:
    end = data.rfind(b"PK\x05\x06", max(0, size - _END.size - _U16))
    if end < 0 or end + _END.size > size:
        raise CheckpointError("truncated: no zip directory at its end")
    _, disk, start_disk, here, entries, length, start, comment = _END.unpack_from(data, end)
    if end + _END.size + comment != size:
        raise CheckpointError("damaged: bytes after the zip directory")
    if disk or start_disk:
        raise CheckpointError("archives of several disks are not read")
    found = _Directory(entries, start, length, end)
    locator = end - _LOCATOR64.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        found = _directory64(data, locator, found)
    elif _U16 in (here, entries) or _U32 in (length, start):
        raise CheckpointError("damaged: zip64 directory announced and missing")
    elif here != entries:
        raise CheckpointError("damaged: the two entry counts of the zip directory differ")
    if found.start + found.size != found.end:
        raise CheckpointError("damaged: the zip directory is not where its end says")
    return found


def _directory64(data: mmap.mmap, locator: int, short: _Directory) -> _Directory:
    _, disk, end, disks = _LOCATOR64.unpack_from(data, locator)
    if disk or disks != 1:
        raise CheckpointError("archives of several disks are not read")
    if end + _END64.size > locator or data[end : end + 4] != b"PK\x06\x06":
        raise CheckpointError("damaged: zip64 directory not found")
    _, length, _, _, disk, start_disk, here, entries, size, start = _END64.unpack_from(data, end)
    if length != locator - end - 12 or disk or start_disk or here != entries:
        raise CheckpointError("damaged: zip64 directory end inconsistent")
    for small, large, top in (
        (short.entries, entries, _U16), (short.size, size, _U32), (short.start, start, _U32)
    ):  # fmt: skip
        if small not in (large, top):
            raise CheckpointError("damaged: the zip and zip64 directories differ")
    return _Directory(entries, start, size, end)


def _read_members(data: mmap.mmap, size: int, limits: Limits) -> dict[str, Member]:
    directory = _find_directory(data, size)
    if directory.entries > limits.members:
        raise CheckpointError(f"expected <= {limits.members} members, got {directory.entries}")
    members: dict[str, Member] = {}
    ranges: list[tuple[int, int, str]] = []
    root, at = None, directory.start
    for _ in range(directory.entries):
        if at + _CENTRAL.size > directory.end or data[at : at + 4] != b"PK\x01\x02":
            raise CheckpointError("damaged: zip directory entry expected")
        (_, _, _, flags, method, _, _, crc, packed, length, n_name, n_extra, n_comment, disk, _, _,
         header) = _CENTRAL.unpack_from(data, at)  # fmt: skip
        after = at + _CENTRAL.size
        at = after + n_name + n_extra + n_comment
        if at > directory.end or disk not in (0, _U16):
            raise CheckpointError("damaged: zip directory entry out of range")
        raw = data[after : after + n_name]
        parts = _checked_name(raw, limits)
        extra = data[after + n_name : after + n_name + n_extra]
        length, packed, header = _widen(extra, [length, packed, header])
        name = "/".join(parts[1:])
        if flags & _ENCRYPTED:
            raise CheckpointError(f"encrypted member {name} is not read")
        if method != 0 or packed != length:
            raise CheckpointError(
                f"compressed member {name} (method {method}, {packed} -> {length} bytes) is "
                "refused: torch.save stores its members"
            )
        root = parts[0] if root is None else root
        if parts[0] != root:
            raise CheckpointError(f"expected one root folder, got {root!r} and {parts[0]!r}")
        if name in members:
            raise CheckpointError(f"duplicate member {name}")
        start = _payload(data, header, raw, name, directory.start)
        if start + length > directory.start:
            raise CheckpointError(
                f"truncated: member {name} of {length} bytes ends outside the file"
            )
        members[name] = Member(start, length, crc)
        ranges.append((header, start + length, name))
    if at != directory.end:
        raise CheckpointError("damaged: zip directory longer than its entries")
    ranges.sort()
    for (_, stop, first), (begin, _, second) in itertools.pairwise(ranges):
        if begin < stop:
            raise CheckpointError(f"overlapping members {first} and {second}")
    return members


def _widen(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset, zip64 values where the 32-bit ones are saturated (APPNOTE §4.5.3)."""
    if _U32 not in values:
        return values
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1 and len(body) == length >= 8 * values.count(_U32):
            wide = iter(struct.unpack_from(f"<{length // 8}Q", body))
            return [next(wide) if value == _U32 else value for value in values]
        at += 4 + length
    raise CheckpointError("damaged: zip64 sizes announced and missing")


def _checked_name(raw: bytes, limits: Limits) -> list[str]:
    if len(raw) > limits.name_bytes:
        raise CheckpointError(f"member name of {len(raw)} bytes, expected <= {limits.name_bytes}")
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"member name {raw[:64]!r} is not UTF-8") from None
    parts = name.split("/")
    if len(parts) < 2 or any(p in ("", ".", "..") for p in parts) or not name.isprintable() or (
        "\\" in name or ":" in parts[0]
    ):  # fmt: skip
        raise CheckpointError(
            f"refused member name {name!r}: expected root/name inside the archive"
        )
    return parts


def _payload(data: mmap.mmap, header: int, raw: bytes, name: str, end: int) -> int:
    """Where a member's bytes start: after its local header, which must match the directory."""
    if header + _LOCAL.size > end or data[header : header + 4] != b"PK\x03\x04":
        raise CheckpointError(f"damaged: member {name} has no local header")
    _, _, flags, method, _, _, _, _, _, n_name, n_extra = _LOCAL.unpack_from(data, header)
    after = header + _LOCAL.size
    if flags & _ENCRYPTED or method != 0 or data[after : after + n_name] != raw:
        raise CheckpointError(f"damaged: local header of {name} differs from the directory")
    return int(after + n_name + n_extra)


__all__ = ["Archive", "Member"]
