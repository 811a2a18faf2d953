"""A folder of tokens, read: what is refused, and what to do then."""

import json

import numpy as np
import pytest
import torch
from fake_pictures import FakeSource, FakeTokenizer, pictures_of, ranks_of, spec_for, write

from dar_train.tokens import (
    View,
    check_belongs,
    folder_hash,
    open_store,
    unigram,
    views_of,
    write_tokens,
)
from dar_train.tokens.manifest import names_hash, read_manifest


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "tokens", FakeSource(broken=(7, 9)))
    return tmp_path / "tokens"


def test_what_is_read_is_what_was_written(folder) -> None:
    store = open_store(folder)
    assert store.codes.shape == (3, 45, 5)
    held_out = [i for i in range(0, 45, 9) if i != 9]  # 9 could not be read
    assert store.held_out.tolist() == held_out
    assert store.train.tolist() == [i for i in range(45) if i % 9 and i != 7]
    assert store.labels[[1, 2, 7]].tolist() == [1, 0, -1]
    views, pictures = torch.tensor([2, 0]), torch.tensor([4, 44])
    expected = np.load(folder / "codes.npy")[[2, 0], [4, 44]].astype(np.int64)
    rows = store.rows(views, pictures)
    assert rows.dtype == torch.int64
    assert (rows.numpy() == expected).all()
    assert int(rows.max()) > 2**15
    assert store.plain == 0


def test_equal_folders_have_equal_fingerprints(folder, tmp_path) -> None:
    write(tmp_path / "again", FakeSource(broken=(7, 9)))
    write(tmp_path / "other", FakeSource(broken=(7,)))
    prints = [open_store(tmp_path / n).fingerprint for n in ("tokens", "again", "other")]
    assert prints[0] == prints[1] != prints[2]


def test_the_plain_view_of_a_ten_crop_is_its_middle(tmp_path) -> None:
    tokenizer, pictures = FakeTokenizer(), pictures_of(FakeSource(9))
    spec = spec_for(tokenizer, pictures, views=views_of(ten_crop=True))
    write_tokens(tmp_path, tokenizer, pictures, spec, ranks_of())
    assert open_store(tmp_path).plain == 4


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["plain"]),
        ({"flip": True}, ["plain", "plain mirrored"]),
        ({"moves": 2}, ["plain", "move 0", "move 1"]),
        ({"flip": True, "moves": 1}, ["plain", "plain mirrored", "move 0 mirrored"]),
        ({"ten_crop": True, "flip": True}, [f"crop {k}" for k in range(10)]),
    ],
)
def test_views(options, names) -> None:
    assert [str(view) for view in views_of(**options)] == names
    assert View() == views_of()[0]


def change(folder, **values) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def overwrite(folder, name: str, place: int) -> None:
    content = bytearray((folder / name).read_bytes())
    content[place] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "manifest.json").unlink(), "expected a folder that dar tokenize wrote"),
        (lambda f: (f / "manifest.json").write_text("{"), "expected JSON in .*manifest.json"),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "expected JSON in .*manifest.json"),
        (lambda f: (f / "manifest.json").write_text("[]"), "expected format 1 in .*, got None"),
        (lambda f: change(f, format=2), "expected format 1 in .*, got 2; remove the folder"),
        (lambda f: change(f, views=[{"zoom": 2}]), "expected a manifest of dar tokenize"),
        (lambda f: change(f, complete=False), "got 0 of 12 chunks; run the same dar tokenize"),
        (lambda f: change(f, checksums=[]), "got 0 checksums in the manifest"),
        (lambda f: change(f, tokens=4), r"codes.npy, got not uint16 \[3, 45, 4\]"),
        (lambda f: change(f, held_out="0" * 64), "held_out.npy, got another split"),
        (lambda f: (f / "codes.npy").unlink(), "codes.npy, got FileNotFoundError"),
        (lambda f: (f / "codes.npy").write_bytes(b"PK"), "codes.npy, got "),
        (lambda f: (f / "codes.npy").write_bytes(b""), "codes.npy, got EOFError"),
        (lambda f: overwrite(f, "codes.npy", -1), "other codes or labels of pictures 44 to 44"),
        (lambda f: overwrite(f, "codes.npy", 128), "other codes or labels of pictures 0 to 3"),
        (lambda f: overwrite(f, "labels.npy", 128 + 32), "labels of pictures 8 to 11"),
        (lambda f: np.save(f / "labels.npy", np.array([{}], dtype=object)), "labels.npy, got"),
        (lambda f: overwrite(f, "held_out.npy", -2), "held_out.npy, got another split"),
    ],
)
def test_damage_is_refused(folder, damage, match) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=rf"tokens: .*{match}"):
        open_store(folder)


def test_a_large_store_is_checked_on_demand(folder, monkeypatch) -> None:
    monkeypatch.setattr("dar_train.tokens.store.VERIFIED_BYTES", 0)
    overwrite(folder, "codes.npy", -1)
    open_store(folder)
    with pytest.raises(ValueError, match="pictures 44 to 44"):
        open_store(folder, verify=True)


def test_a_store_needs_both_parts(tmp_path) -> None:
    write(tmp_path, FakeSource(9, broken=(0,)))
    with pytest.raises(ValueError, match="expected at least one held-out picture in"):
        open_store(tmp_path)


def test_labels_beyond_the_names_are_refused(folder) -> None:
    change(folder, label_names=["left"])
    with pytest.raises(ValueError, match="labels: expected 0 to 0, got 1 of picture 1, the first"):
        open_store(folder)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"tokenizer": "b" * 64}, "tokenizer b{12}, got a{12} in .*dar tokenize into another .*"),
        ({"data": "c" * 64}, "pictures c{12}, got [0-9a-f]{12} in .* set --data"),
        (
            {"label_names": ["left", "up"]},
            f"label names {names_hash(['left', 'up'])[:12]}, got "
            f"{names_hash(['left', 'right'])[:12]} in .* set --data",
        ),
    ],
)
def test_what_does_not_belong_together(folder, given, match) -> None:
    store = open_store(folder)
    manifest = read_manifest(folder)
    assert manifest is not None
    check_belongs(store, tokenizer="a" * 64, data=manifest.spec.data, label_names=["left", "right"])
    with pytest.raises(ValueError, match=f"tokens: expected those of {match}"):
        check_belongs(store, **given)


def test_a_folder_hash_sees_names_and_contents(tmp_path) -> None:
    (tmp_path / "a").write_text("1")
    first = folder_hash(tmp_path)
    (tmp_path / "a").write_text("2")
    second = folder_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, folder_hash(tmp_path)}) == 3
    with pytest.raises(ValueError, match="expected the folder of a trained tokenizer, got"):
        folder_hash(tmp_path / "none")


def test_unigram_entropy_of_known_counts() -> None:
    train = torch.tensor([0, 0, 1, 1])
    figures = unigram(train, torch.tensor([0, 3]), 4)
    assert figures["unigram_entropy"] == pytest.approx(torch.tensor(2.0).log().item())
    expected = -(torch.tensor(3 / 8).log() + torch.tensor(1 / 8).log()) / 2
    assert figures["unigram_cross_entropy"] == pytest.approx(expected.item())
