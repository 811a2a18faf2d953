"""Sources that need large packages: MDS shards and Hugging Face data sets."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import Settings, encoded, pixels, ranks
from PIL import Image

from dar_train.data import UnreadableError, open_pictures, picture_batches

# streaming leaves its index open
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
LABELS = [number % 3 for number in range(20)]


def rows(kind: str = "PNG"):
    for number, label in enumerate(LABELS):
        yield Image.open(io.BytesIO(encoded(number, kind))), label


def check(source) -> None:
    assert len(source) == len(LABELS)
    for index in reversed(range(len(LABELS))):
        sample = source.read(index)
        assert sample.label == LABELS[index]
        np.testing.assert_array_equal(
            np.asarray(sample.picture.convert("RGB")), np.asarray(pixels(index))
        )


def check_batches(data: Path) -> None:
    """With a worker, to which the source is sent, and without."""
    found = []
    for workers in (0, 1):
        recipe = Settings(data, workers=workers)
        batches = picture_batches(recipe, 8, ranks(), crop=True, flip=True)
        found.append([batch.images.tolist() for batch in (batches.next(), batches.next())])
        batches.close()
    assert found[0] == found[1]


def write_mds(path: Path, columns: dict[str, str], samples) -> None:
    streaming = pytest.importorskip("streaming")
    with streaming.MDSWriter(out=str(path), columns=columns, size_limit=1500) as writer:
        for sample in samples:
            writer.write(sample)


@pytest.mark.parametrize("encoding", ["png", "pil", "bytes"])
def test_mds(tmp_path, encoding) -> None:
    def samples():
        for number, (picture, label) in enumerate(rows()):
            held = encoded(number) if encoding == "bytes" else picture
            if encoding == "pil":
                held = picture.convert("RGB")
            yield {"image": held, "label": label}

    write_mds(tmp_path, {"image": encoding, "label": "int"}, samples())
    assert len(list(tmp_path.glob("shard.*.mds"))) > 1
    pictures = open_pictures(tmp_path, 8)
    check(pictures)
    assert pictures.label_names == []
    assert pictures.name(19).rsplit(".", 2)[1:][0] != ""
    check_batches(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(["x", "y"]))
    recipe = Settings(tmp_path)
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1, got 2 of .*shard\.\d+\.mds:"):
        picture_batches(recipe, 8, ranks(), crop=True, flip=True).next()


def test_mds_jpeg_stays_encoded_until_it_is_cut(tmp_path) -> None:
    samples = ({"image": picture, "label": label} for picture, label in rows("JPEG"))
    write_mds(tmp_path, {"image": "jpeg", "label": "int64"}, samples)
    picture = open_pictures(tmp_path, 8).read(3).picture
    assert picture.draft(None, (10, 8)) is not None


def test_mds_with_pickles_is_refused(tmp_path) -> None:
    samples = ({"image": picture, "label": 0, "more": {}} for picture, _ in rows())
    write_mds(tmp_path, {"image": "png", "label": "int", "more": "pkl"}, samples)
    with pytest.raises(ValueError, match="expected columns without pickles"):
        open_pictures(tmp_path, 8)


def test_a_shard_that_vanished_is_unreadable(tmp_path) -> None:
    write_mds(
        tmp_path, {"image": "png", "label": "int"}, ({"image": p, "label": i} for p, i in rows())
    )
    pictures = open_pictures(tmp_path, 8)
    (tmp_path / "shard.00000.mds").unlink()
    with pytest.raises(UnreadableError, match=r"shard\.00000\.mds"):
        pictures.read(0)
    assert pictures.read(19).label == LABELS[19]


def test_mds_index_of_something_else(tmp_path) -> None:
    pytest.importorskip("streaming")
    (tmp_path / "index.json").write_text('{"shards": []}')
    with pytest.raises(ValueError, match=r"expected an index of MDS shards, got .*index\.json"):
        open_pictures(tmp_path, 8)


@pytest.fixture
def dataset():
    datasets = pytest.importorskip("datasets")
    content = {
        "image": [{"bytes": encoded(number), "path": None} for number in range(20)],
        "label": LABELS,
        "text": ["unused"] * 20,
    }
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["x", "y", "z"]),
        text=datasets.Value("string"),
    )  # fmt: skip
    return datasets.Dataset.from_dict(content, features=features)


def test_hub_saved_to_disk(dataset, tmp_path) -> None:
    dataset.save_to_disk(str(tmp_path / "set"))
    data = Path(f"hf:{tmp_path / 'set'}")
    pictures = open_pictures(data, 8)
    check(pictures)
    assert pictures.label_names == ["x", "y", "z"]
    assert len(pictures.held_out) == 2
    check_batches(data)


def test_hub_splits_saved_to_disk(dataset, tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": dataset.select(range(15)), "validation": dataset.select(range(15, 20))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    pictures = open_pictures(Path(f"hf:{tmp_path}"), 8)
    check(pictures)
    assert pictures.held_out.tolist() == [15, 16, 17, 18, 19]


def test_hub_parquet(dataset, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = tmp_path / "set" / "data"
    place.mkdir(parents=True)
    for split, chosen in (("train", range(15)), ("validation", range(15, 20))):
        dataset.select(chosen).to_parquet(place / f"{split}-00000-of-00001.parquet")
    pictures = open_pictures(Path(f"hf:{tmp_path / 'set'}"), 8)
    check(pictures)
    assert pictures.held_out.tolist() == [15, 16, 17, 18, 19]


def test_hub_without_pictures(dataset, tmp_path) -> None:
    dataset.remove_columns("image").save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected a column of pictures and one of label.*got la"):
        open_pictures(Path(f"hf:{tmp_path}"), 8)


@pytest.mark.parametrize(
    ("package", "make", "message"),
    [
        ("streaming", "index.json", r"mosaicml-streaming: pip install 'dar-fast\[mds\]'"),
        ("datasets", "a.parquet", r"package datasets: pip install 'dar-fast\[hf\]'"),
    ],
)
def test_missing_packages_are_named(tmp_path, monkeypatch, package, make, message) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / make).write_text("{}")
    with pytest.raises(RuntimeError, match=message):
        open_pictures(tmp_path, 8)
