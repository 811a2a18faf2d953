"""Writing tokens: the same bytes whoever writes them and however often he is killed."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_pictures import (
    SIZE,
    VIEWS,
    FakeSource,
    FakeTokenizer,
    contents,
    pictures_of,
    ranks_of,
    spec_for,
    write,
)

from dar_train.tokens import open_store, read_manifest, writer
from dar_train.tokens.encode import write_tokens
from dar_train.tokens.manifest import View
from dar_train.tokens.writer import Writer, read_progress


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "tokens"
    assert write(folder)
    return contents(folder)


class Stopped(BaseException):
    """Raised in place of a kill."""


def stop_after(chunks: int):
    def report(now) -> None:
        if now.chunk == chunks:
            raise Stopped

    return report


def test_codes_are_those_of_each_view(tmp_path) -> None:
    source = FakeSource(broken=(7, 20))
    assert write(tmp_path, source)
    assert sorted(contents(tmp_path)) == [
        "codes.npy", "held_out.npy", "labels.npy", "manifest.json"
    ]  # fmt: skip
    codes, labels = np.load(tmp_path / "codes.npy"), np.load(tmp_path / "labels.npy")
    assert codes.dtype == np.uint16
    assert codes.max() > 2**15
    images = torch.from_numpy(source.images.transpose(0, 3, 1, 2).copy()) / 127.5 - 1
    every = FakeTokenizer(len(source))
    kept = np.setdiff1d(np.arange(45), [7, 20])
    assert (codes[0, kept] == every.encode(images).numpy()[kept]).all()
    assert (codes[1, kept] == every.encode(images.flip(-1)).numpy()[kept]).all()
    assert (codes[2, kept] != codes[0, kept]).any(axis=1).all()
    assert not codes[:, [7, 20]].any()
    assert (labels[kept] == kept % 2).all()
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest.complete
    assert manifest.skipped == ((7, "picture-7: damaged"), (20, "picture-20: damaged"))
    assert (np.load(tmp_path / "held_out.npy").nonzero()[0] == range(0, 45, 9)).all()


def test_a_ten_crop_is_centre_and_corners_with_their_mirror_images(tmp_path) -> None:
    tokenizer, pictures = FakeTokenizer(), pictures_of(FakeSource(9))
    views = tuple(View(crop=k) for k in range(10))
    spec = spec_for(tokenizer, pictures, views=views)
    assert write_tokens(tmp_path, tokenizer, pictures, spec, ranks_of())
    single = tmp_path / "single"
    for k in (3, 8):
        alone = replace(spec, views=(View(crop=k),))
        write_tokens(single / str(k), tokenizer, pictures, alone, ranks_of())
        found = np.load(single / str(k) / "codes.npy")[0]
        assert (found == np.load(tmp_path / "codes.npy")[k]).all()
    assert SIZE == pictures.read(0).picture.shape[0]


@pytest.mark.parametrize(("chunks", "workers"), [(1, 0), (5, 0), (12, 0), (5, 1)])
def test_goes_on_where_it_stopped(tmp_path, whole, chunks, workers) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, report=stop_after(chunks), workers=workers)
    assert multiprocessing.active_children() == []
    assert len(read_progress(tmp_path)) == chunks
    counted = []
    assert write(tmp_path, report=counted.append)
    assert (len(counted), counted[-1].chunks if counted else 0) == (12 - chunks,) * 2
    assert contents(tmp_path) == whole


def test_survives_being_killed_in_any_system_call(tmp_path, whole) -> None:
    script = Path(__file__).with_name("killed_writing.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "tokens"), "1"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10
    assert contents(tmp_path / "tokens") == whole


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_write_what_one_process_writes(tmp_path, whole, world) -> None:
    with ThreadPoolExecutor(world) as pool:
        ends = list(pool.map(lambda rank: write(tmp_path, None, rank, world), range(world)))
    assert any(ends)
    assert contents(tmp_path) == whole


def test_another_number_of_ranks_goes_on(tmp_path, whole) -> None:
    for rank in (0, 1):
        with pytest.raises(Stopped):
            write(tmp_path, None, rank, 2, report=stop_after(2))
    assert len(read_progress(tmp_path)) == 4
    assert not write(tmp_path, None, 0, 3)
    assert not write(tmp_path, None, 1, 3)
    assert write(tmp_path, None, 2, 3)
    assert contents(tmp_path) == whole


def test_a_rank_waits_for_the_first_ones_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "FIRST_RANK_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match=r"expected the first rank's manifest.json in .*share"):
        write(tmp_path, None, 1, 2)


def test_damaged_chunks_are_written_again(tmp_path, whole) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, report=stop_after(6))
    with (tmp_path / "codes.npy").open("rb+") as file:
        file.seek(128 + 2)  # the second code of the first picture
        file.write(b"\xff\xff")
    tokenizer, pictures = FakeTokenizer(), pictures_of(FakeSource())
    spec = spec_for(tokenizer, pictures)
    assert Writer(tmp_path, spec, np.zeros(45, dtype=bool)).remaining == [0, *range(6, 12)]
    assert write(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: os.truncate(f / "codes.npy", 300), "codes.npy, got ValueError: .*remove"),
        (lambda f: (f / "labels.npy").unlink(), "labels.npy, got FileNotFoundError: .*remove"),
        (
            lambda f: np.save(f / "labels.npy", np.zeros(45)),
            r"int32 \[45\] in .*labels.npy, got float64 \[45\]; remove",
        ),
    ],
)
def test_files_that_cannot_be_written_on_are_refused(tmp_path, damage, match) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, report=stop_after(2))
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"tokens: expected .*{match} the folder and run"):
        write(tmp_path)


def test_a_torn_line_is_no_progress(tmp_path, whole) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, report=stop_after(3))
    file = tmp_path / "progress-00000.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert len(read_progress(tmp_path)) == 2
    with pytest.raises(Stopped):
        write(tmp_path, report=stop_after(2))
    assert len(read_progress(tmp_path)) == 4
    assert write(tmp_path)
    assert contents(tmp_path) == whole


def test_what_is_complete_is_left_alone(tmp_path) -> None:
    assert write(tmp_path)
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert write(tmp_path, report=stop_after(1))
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer_hash": "b" * 64}, "tokenizer: expected b{12}, got a{12};"),
        (
            {"views": VIEWS[:1]},
            "views: expected plain, got plain, plain mirrored, move 0 mirrored;",
        ),
        ({"seed": 4}, "seed: expected 4, got 3;"),
        ({"precision": "bf16"}, "precision: expected bf16, got fp32;"),
        ({"batch": 8}, "batch: expected 8, got 4;"),
    ],
)
@pytest.mark.parametrize("chunks", [2, 99], ids=["partial", "complete"])
def test_other_tokens_are_not_written_over(tmp_path, changes, match, chunks) -> None:
    try:
        write(tmp_path, report=stop_after(chunks))
    except Stopped:
        assert chunks == 2
    before = contents(tmp_path)
    tokenizer, pictures = FakeTokenizer(changes.get("batch", 4)), pictures_of(FakeSource())
    spec = spec_for(tokenizer, pictures, **changes)
    with pytest.raises(ValueError, match=rf"tokens: .* holds others: {match} name another folder"):
        write_tokens(tmp_path, tokenizer, pictures, spec, ranks_of())
    assert contents(tmp_path) == before


def test_a_full_disk_loses_nothing(tmp_path, whole, monkeypatch) -> None:
    real, calls = os.pwrite, []

    def full(handle: int, data: memoryview, place: int) -> int:
        calls.append(place)
        if len(calls) > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data[:7], place)  # short writes are gone on with

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    monkeypatch.undo()
    assert write(tmp_path)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_label_out_of_range_is_named(tmp_path, workers) -> None:
    with pytest.raises(ValueError, match=r"^labels: expected 0 to 1, got 2 of picture-1$"):
        write(tmp_path, FakeSource(label=2), workers=workers)
    assert multiprocessing.active_children() == []  # nobody waits for them later
    with pytest.raises(ValueError, match="got 0 of 12 chunks; run the same dar tokenize again"):
        open_store(tmp_path)


def test_known_labels_are_checked_before_anything_is_written(tmp_path) -> None:
    source = FakeSource()
    source.labels = np.where(np.arange(45) == 30, -5, 0)
    with pytest.raises(ValueError, match="labels: expected 0 to 1, got -5 of picture-30"):
        write(tmp_path / "tokens", source)
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"views": ()}, "views: expected at least one"),
    ],
)
def test_settings_are_checked(changes, match) -> None:
    with pytest.raises(ValueError, match=match):
        spec_for(FakeTokenizer(), pictures_of(FakeSource()), **changes)


def test_codes_fit_sixteen_bits() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.config.codebook_size = 2**16 + 1
    with pytest.raises(ValueError, match="expected a codebook of at most 65536, got 65537"):
        spec_for(tokenizer, pictures_of(FakeSource()))


def test_the_manifest_is_plain_json(whole) -> None:
    values = json.loads(whole["manifest.json"])
    assert values["format"] == 1
    assert values["views"][1] == {"crop": None, "flip": True, "move": None}
    assert values["label_names"] == ["left", "right"]
    assert (values["pictures"], values["tokens"], len(values["checksums"])) == (45, 5, 12)
