"""Archives that lie about their members: each gives a CheckpointError that says what is wrong."""

import io
import random
import struct
import tarfile
import zipfile

import pickled as op
import pytest
import torch

from dar_fast.checkpoint.errors import CheckpointError, Limits

BODY = op.P2 + b"}" + op.text("w") + op.tensor() + b"s."


def replace(path, old, new, count=-1):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))


@pytest.fixture
def saved(tmp_path):
    """A small file of torch.save."""
    path = tmp_path / "saved.pt"
    torch.save({"w": torch.arange(20.0), "b": torch.ones(3, dtype=torch.int64)}, path)
    return path


def test_a_good_one_first(pack, read):
    assert torch.equal(read(pack(BODY))["w"], torch.zeros(4))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../evil": b""}, "refused member name"),
        ({"a/../../evil": b""}, "refused member name"),
        ({"/etc/passwd": b""}, "refused member name"),
        ({"a\\b": b""}, "refused member name"),
        ({"./a": b""}, "refused member name"),
        ({"a\nb": b""}, "refused member name"),
        ({"a/": b""}, "refused member name"),
        ({"a" * 600: b""}, "member name of"),
        ({"constants.pkl": b""}, "TorchScript"),
        ({"code/__torch__.py": b""}, "TorchScript"),
        ({"byteorder": b"big"}, "little-endian"),
    ],
    ids=lambda x: str(x)[:24],
)
def test_members(pack, read, members, message):
    with pytest.raises(CheckpointError, match=message):
        read(pack({"data.pkl": BODY, "data/0": bytes(16)} | members))


def test_no_pickle(pack, read):
    with pytest.raises(CheckpointError, match=r"expected a member data\.pkl"):
        read(pack({"data/0": bytes(16)}))


def test_two_roots(pack, read):
    path = pack(BODY)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data/1", b"x")
    with pytest.raises(CheckpointError, match="one root folder"):
        read(path)


def test_no_root(pack, read):
    with pytest.raises(CheckpointError, match="refused member name"):
        read(pack(BODY, root=""))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_members(pack, read):
    path = pack(BODY)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", op.P2 + b"N.")
    with pytest.raises(CheckpointError, match=r"duplicate member data\.pkl"):
        read(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_bomb(pack, read, method):
    path = pack(BODY, method=method, storage=bytes(8 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match=r"compressed member .* is refused"):
        read(path)


def test_too_many_members(pack, read):
    with pytest.raises(CheckpointError, match="expected <= 2 members, got 3"):
        read(pack(BODY), limits=Limits(members=2))


def _directory_entries(data):
    """Offsets of the central directory entries by name."""
    found, at = {}, data.find(b"PK\x01\x02")
    while at >= 0:
        (length,) = struct.unpack_from("<H", data, at + 28)
        found[data[at + 46 : at + 46 + length].decode()] = at
        at = data.find(b"PK\x01\x02", at + 46)
    return found


def _patch(path, name, offset, layout, value):
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, _directory_entries(bytes(data))[name] + offset, value)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (8, "<H", 1, "encrypted"),
        (8, "<H", 0x2000, "encrypted"),
        (10, "<H", 8, "compressed"),
        (10, "<H", 99, "compressed"),
        (24, "<I", 1 << 30, "compressed"),
        (34, "<H", 3, "out of range"),
        (42, "<I", 0, "differs from the directory"),
        (42, "<I", 1 << 31, "no local header"),
        (28, "<H", 0xFFFF, "out of range"),
        (30, "<H", 0xFFFF, "out of range"),
        (0, "<I", 0, "entry expected"),
    ],
)
def test_patched_directory(pack, read, offset, layout, value, message):
    path = pack(BODY)
    _patch(path, "archive/data/0", offset, layout, value)
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_declared_size_beyond_the_file(pack, read):
    path = pack(BODY)
    for offset in (20, 24):
        _patch(path, "archive/data/0", offset, "<I", 1 << 30)
    with pytest.raises(CheckpointError, match="of 1073741824 bytes ends outside the file"):
        read(path)


def test_zip64_sizes(pack, read):
    path = pack(BODY)
    for offset in (20, 24):
        _patch(path, "archive/data/0", offset, "<I", 0xFFFFFFFF)
    with pytest.raises(CheckpointError, match="zip64 sizes announced and missing"):
        read(path)


def test_overlapping_storages(pack, read):
    """One member's range over the next one's: two names for the same bytes."""
    path = pack({"data.pkl": BODY, "data/0": bytes(16), "data/1": bytes(16)})
    entries = _directory_entries(path.read_bytes())
    first, second = (
        struct.unpack_from("<I", path.read_bytes(), entries[f"archive/data/{i}"] + 42)[0]
        for i in range(2)
    )
    for offset in (20, 24):
        _patch(path, "archive/data/0", offset, "<I", second - first)
    with pytest.raises(CheckpointError, match="overlapping members data/0 and data/1"):
        read(path)


def test_overlapping_headers(pack, read):
    """A member whose bytes hold the next member's header (a quoted zip)."""
    inner = (
        struct.pack("<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 4, 4, 14, 0) + b"archive/data/1"
    )
    path = pack({"data.pkl": BODY, "data/0": inner + b"abcd", "data/1": b"abcd"})
    at = path.read_bytes().find(inner)
    _patch(path, "archive/data/1", 42, "<I", at)
    with pytest.raises(CheckpointError, match="overlapping members data/0 and data/1"):
        read(path)


def test_bytes_behind_and_before(pack, read):
    path = pack(BODY)
    good = path.read_bytes()
    path.write_bytes(good + b"x")
    with pytest.raises(CheckpointError, match="after the zip directory"):
        read(path)
    path.write_bytes(b"PK" + good)
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


def _legacy(path):
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def _tar(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_legacy, r"legacy \(non-zip\).*torch\.save the state dict"),
        (_tar, "expected a torch zip archive"),
        (lambda p: p.write_bytes(b"\x80\x02N."), "bare pickle"),
        (lambda p: p.write_bytes(b""), "empty file"),
        (lambda p: p.write_bytes(b"PK"), "truncated"),
        (lambda p: p.write_bytes(b"<html>"), "starts with b'<html>'"),
        (lambda p: p.write_bytes(b"PK\x05\x06" + bytes(18)), r"expected a member data\.pkl"),
    ],
    ids=["legacy", "tar", "pickle", "empty", "two bytes", "html", "empty zip"],
)
def test_other_files(tmp_path, read, write, message):
    path = tmp_path / "file.pt"
    write(path)
    with pytest.raises(CheckpointError, match=message):
        read(path)


def test_missing_file(tmp_path, read):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path)


def test_truncated_everywhere(saved, read):
    data = saved.read_bytes()
    for length in range(0, len(data), 3):
        saved.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read(saved)


def test_damaged_weights_are_found_by_checksum(saved, read):
    payload = torch.arange(20.0).numpy().tobytes()
    replace(saved, payload, b"\x01" + payload[1:])
    with pytest.raises(CheckpointError, match="checksum of data/0 does not match"):
        read(saved)
    assert read(saved, verify=False)["w"].shape == (20,)


def test_damaged_pickle_is_always_found(saved, read):
    replace(saved, b"_rebuild_tensor_v2", b"_rebuild_tensor_v3")
    with pytest.raises(CheckpointError, match=r"checksum of data\.pkl"):
        read(saved, verify=False)


def test_a_thousand_flipped_bits(saved, read):
    """Each either changes nothing that is read, or is refused."""
    good, draw = saved.read_bytes(), random.Random(3)
    expected = {name: value.clone() for name, value in read(saved).items()}  # off the mapping
    refused = 0
    for _ in range(1000):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        saved.write_bytes(data)
        try:
            value = read(saved)
        except CheckpointError:
            refused += 1
            continue
        assert value.keys() == expected.keys()
        assert all(torch.equal(value[name], expected[name]) for name in expected)
    assert refused > 300


def test_archives_without_checksums_are_read(tmp_path, read):
    path = tmp_path / "plain.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read(path)["w"], torch.ones(3))
