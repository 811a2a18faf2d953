"""What every kind of storage gives: samples by number, names, labels, splits, fingerprints."""

import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import add, encoded, folder, pixels, tars

from dar_train.data import UnreadableError, load_pictures, open_pictures
from dar_train.data.mds import columns_of
from dar_train.data.tars import Tars, expanded


def shown(source, index: int) -> np.ndarray:
    return np.asarray(source.read(index).picture.convert("RGB"))


def check_numbers(source, labels) -> None:
    """Sample i is picture i with its label, also once sent to another process."""
    copy = pickle.loads(pickle.dumps(source))
    assert len(source) == len(labels)
    for index in reversed(range(len(source))):
        assert source.read(index).label == labels[index]
        np.testing.assert_array_equal(shown(source, index), np.asarray(pixels(index)))
        np.testing.assert_array_equal(shown(copy, index), np.asarray(pixels(index)))
    assert copy.fingerprint == source.fingerprint


def test_folder_of_pictures(tmp_path) -> None:
    place = folder(tmp_path / "here", (9, 0, 11))
    (place / "a" / "notes.txt").write_text("not a picture")
    pictures = open_pictures(place, 8)
    assert pictures.label_names == ["a", "b", "c"]
    assert [pictures.name(i) for i in (0, 19)] == ["a/000.png", "c/019.png"]
    check_numbers(pictures, [0] * 9 + [2] * 11)
    assert len(pictures.held_out) == 2
    assert sorted([*pictures.train.tolist(), *pictures.held_out.tolist()]) == list(range(20))


def test_folders_within_labels_and_names_that_are_not_ascii(tmp_path) -> None:
    inner = tmp_path / "a" / "ä ö"
    inner.mkdir(parents=True)
    for number in range(3):
        (inner / f"{number}é.PNG").write_bytes(encoded(number))
    pictures = open_pictures(tmp_path, 8)
    assert pictures.name(2) == "a/ä ö/2é.PNG"
    check_numbers(pictures, [0, 0, 0])


def test_fingerprints_tell_data_apart_and_not_places(tmp_path) -> None:
    here = folder(tmp_path / "here")
    found = {"here": open_pictures(here, 8).fingerprint}
    shutil.copytree(here, tmp_path / "there")
    assert open_pictures(tmp_path / "there", 8).fingerprint == found["here"]
    (here / "a" / "000.png").write_bytes(encoded(0, "WEBP"))
    found["another size"] = open_pictures(here, 8).fingerprint
    (here / "a" / "000.png").rename(here / "b" / "000.png")
    found["another label"] = open_pictures(here, 8).fingerprint
    shards = tars(tmp_path / "tars")
    found["tars"] = open_pictures(shards, 8).fingerprint
    found["fewer"] = Tars([shards / "shards-000000.tar"]).fingerprint
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_train_and_val_folders_are_the_split(tmp_path, validation) -> None:
    folder(tmp_path / "train", (5, 4))
    folder(tmp_path / validation, (2, 1), first=9)
    pictures = open_pictures(tmp_path, 8)
    assert pictures.train.tolist() == list(range(9))
    assert pictures.held_out.tolist() == [9, 10, 11]
    check_numbers(pictures, [0] * 5 + [1] * 4 + [0] * 2 + [1])


def test_train_and_val_must_have_the_same_labels(tmp_path) -> None:
    folder(tmp_path / "train", (5, 4))
    folder(tmp_path / "val", (2,))
    with pytest.raises(ValueError, match="same labels in train and val, got 2 and 1 names"):
        open_pictures(tmp_path, 8)


@pytest.mark.parametrize("suffix", ["cls", "json"])
def test_tars(tmp_path, suffix) -> None:
    place = tars(tmp_path, suffix=suffix)
    whole = open_pictures(place, 8)
    check_numbers(whole, [number % 4 for number in range(21)])
    assert whole.label_names == ["0", "1", "2", "3"]
    assert whole.name(7).endswith("shards-000001.tar/0007")
    by_pattern = open_pictures(place / "shards-{000000..000002}.tar", 8)
    assert by_pattern.fingerprint == whole.fingerprint
    assert len(open_pictures(place / "shards-000001.tar", 8)) == 7
    (place / "labels.json").write_text(json.dumps(["w", "x", "y", "z"]))
    assert open_pictures(place, 8).label_names == ["w", "x", "y", "z"]
    (place / "labels.json").write_text(json.dumps(["w"]))
    with pytest.raises(ValueError, match=r"expected 4 names in .*labels\.json, got 1"):
        open_pictures(place, 8)


def test_tars_are_split_by_folder_too(tmp_path) -> None:
    tars(tmp_path / "train")
    tars(tmp_path / "val", shards=1)
    assert len(open_pictures(tmp_path, 8).held_out) == 7


def test_samples_without_a_half_are_unreadable_and_named(tmp_path) -> None:
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        add(archive, "x/1.seg.png", b"another file of the sample")
        add(archive, "x/1.png", encoded(1))
        add(archive, "x/1.cls", b"7\n")
        add(archive, "x/2.png", encoded(2))
        add(archive, "x/3.cls", b"1")
        add(archive, "x/4.cls", b"one")
        add(archive, "x/4.png", encoded(4))
        add(archive, "y/4.png", encoded(5))
        add(archive, "y/4.json", b'{"label": true}')
    source = Tars([file])
    assert [source.name(i).split(".tar/")[1] for i in range(5)] == [
        "x/1", "x/2", "x/3", "x/4", "y/4",
    ]  # fmt: skip
    assert source.read(0).label == 7
    np.testing.assert_array_equal(shown(source, 0), np.asarray(pixels(1)))
    for index, reason in ((1, "label"), (2, "no picture"), (3, "label"), (4, "label")):
        with pytest.raises(UnreadableError, match=reason):
            source.read(index)


@pytest.mark.parametrize("more", [0, 100, 700], ids=["between", "header", "content"])
def test_a_truncated_tar_keeps_its_beginning(tmp_path, caplog, more) -> None:
    file = tars(tmp_path, shards=1) / "shards-000000.tar"
    content = file.read_bytes()
    file.write_bytes(content[: 5 * 4 * tarfile.BLOCKSIZE + more])
    source = Tars([file])
    assert len(source) == 5
    np.testing.assert_array_equal(shown(source, 0), np.asarray(pixels(0)))
    assert "is damaged after" in caplog.text


@pytest.mark.parametrize("content", [b"", b"x" * 2000, None], ids=["empty", "text", "missing"])
def test_what_is_no_tar(tmp_path, content) -> None:
    file = tmp_path / "a.tar"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*a\.tar"):
        Tars([file])


def test_tars_without_labels(tmp_path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "1.png", encoded(1))
    with pytest.raises(ValueError, match=r"with \.cls or \.json in .*got no such pair"):
        Tars([tmp_path / "a.tar"])


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("plain.tar", ["plain.tar"]),
    ],
)
def test_patterns(pattern, expected) -> None:
    assert expanded(pattern) == [Path(name) for name in expected]


def test_a_pattern_backwards() -> None:
    with pytest.raises(ValueError, match=r"expected a range .*got \{3\.\.1\}"):
        expanded("{3..1}.tar")


def test_columns_of_mds_shards() -> None:
    assert columns_of({"i": "int", "image": "jpeg", "label": "int64"}) == ("image", "label")
    assert columns_of({"raw": "bytes", "p": "png", "n": "uint16"}) == ("p", "n")
    with pytest.raises(ValueError, match="expected columns without pickles, got x: pkl"):
        columns_of({"x": "pkl", "image": "jpeg", "label": "int"})
    with pytest.raises(ValueError, match="a picture's and a label's column, got image: jpeg"):
        columns_of({"image": "jpeg"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "missing.npz", "packed file or a folder of pictures, got"),
        (lambda path: path, "expected sub-folders with pictures"),
        (lambda path: Path(f"hf:{path}/missing"), "expected a folder after hf:, got"),
        (lambda path: Path(f"hf:{path}"), "saved to disk or parquet, got"),
    ],
    ids=["missing", "empty", "hub-missing", "hub-empty"],
)
def test_bad_paths(tmp_path, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_pictures(make(tmp_path), 8)


def test_in_memory(tmp_path, caplog) -> None:
    place = folder(tmp_path, (10, 10))
    whole = load_pictures(place, 8)
    assert whole.images.shape == (20, 3, 8, 8)
    assert whole.labels.tolist() == [0] * 10 + [1] * 10
    gone = whole.names[int(whole.train[0])]
    (place / gone).write_bytes((place / gone).read_bytes()[:50])
    rest = load_pictures(place, 8)
    assert gone in caplog.text
    assert rest.names == [name for name in whole.names if name != gone]
    held_out = [whole.names[index] for index in whole.held_out.tolist()]
    assert [rest.names[index] for index in rest.held_out.tolist()] == held_out
    assert len(rest.train) == len(whole.train) - 1


def test_one_picture_cannot_be_split(tmp_path) -> None:
    with pytest.raises(ValueError, match="at least one training picture, got none"):
        open_pictures(folder(tmp_path, (1,)), 8)
