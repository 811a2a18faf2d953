"""Pipeline folders: round trips, what is refused, and that nothing is left half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dar_fast import DARPipeline, __version__
from dar_fast.checkpoint import CheckpointError, pipeline_folder, save_model
from dar_fast.checkpoint.pipeline_folder import pick_dtype


@pytest.fixture
def folder(tiny_pipeline: DARPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(tiny_pipeline: DARPipeline, folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["model_index.json", "prior", "tokenizer"]
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "DARPipeline"
    assert index["_dar_fast_version"] == __version__
    assert index["labels"] == list(tiny_pipeline.labels)
    pipe = DARPipeline.from_pretrained(folder, device="cpu")
    assert pipe.labels == tiny_pipeline.labels
    assert pipe.dtype == torch.float32
    for ours, theirs in (
        (pipe.prior, tiny_pipeline.prior),
        (pipe.tokenizer, tiny_pipeline.tokenizer),
    ):
        assert not ours.training
        theirs_state = theirs.state_dict()
        assert ours.state_dict().keys() == theirs_state.keys()
        assert all(torch.equal(v, theirs_state[k]) for k, v in ours.state_dict().items())
    a = pipe(["cat face"], seeds=1, output_type="pt")
    b = tiny_pipeline(["cat face"], seeds=1, output_type="pt")
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.images, b.images)


def test_stored_bf16_is_computed_in_fp32(fresh_pipeline: DARPipeline, tmp_path: Path) -> None:
    fresh_pipeline.to(dtype=torch.bfloat16).save_pretrained(str(tmp_path))
    pipe = DARPipeline.from_pretrained(str(tmp_path), device="cpu")
    assert pipe.prior.head.weight.dtype == pipe.dtype == torch.float32
    assert torch.equal(pipe.prior.head.weight, fresh_pipeline.prior.head.weight.float())
    half = DARPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_saving_again_replaces_and_keeps_the_rest(
    tiny_pipeline: DARPipeline, fresh_pipeline: DARPipeline, folder: Path
) -> None:
    (folder / "README.md").write_text("card")
    loaded = DARPipeline.from_pretrained(folder, device="cpu")
    with torch.no_grad():
        loaded.prior.norm.weight.mul_(2)
    DARPipeline(loaded.prior, loaded.tokenizer).save_pretrained(folder)
    again = DARPipeline.from_pretrained(folder, device="cpu")
    assert again.labels == {}
    assert torch.equal(again.prior.norm.weight, 2 * tiny_pipeline.prior.norm.weight)
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "model_index.json", "prior", "tokenizer",
    ]  # fmt: skip


def fail_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """A disk that is full after `count` parts."""
    left = [count]

    def write(module: Any, path: Path) -> list[Path]:
        if not left[0]:
            raise OSError(28, "No space left on device")
        left[0] -= 1
        return save_model(module, path)

    monkeypatch.setattr(pipeline_folder, "save_model", write)


@pytest.mark.parametrize("count", [0, 1])
def test_a_full_disk_leaves_nothing(
    tiny_pipeline: DARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    fail_at(monkeypatch, count)
    with pytest.raises(OSError, match="No space left"):
        tiny_pipeline.save_pretrained(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_model(
    fresh_pipeline: DARPipeline, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError, match="No space left"):
        fresh_pipeline.save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_saving_over_a_file(tiny_pipeline: DARPipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        tiny_pipeline.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match=r"expected a pipeline folder with model_index"):
            DARPipeline.from_pretrained(path)
    with pytest.raises(TypeError, match="path: expected a folder or 'demo', got int"):
        DARPipeline.from_pretrained(3)  # type: ignore[arg-type]


def test_a_missing_demo_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_folder.importlib.resources, "files", lambda name: tmp_path)
    with pytest.raises(CheckpointError, match="demo: expected the embedded model"):
        DARPipeline.from_pretrained("demo")


def test_the_demo_is_a_folder_of_the_package(
    tiny_pipeline: DARPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_folder.importlib.resources, "files", lambda name: tmp_path)
    tiny_pipeline.save_pretrained(tmp_path / "assets" / "demo")
    assert DARPipeline.from_pretrained("demo", device="cpu").labels == tiny_pipeline.labels


@pytest.mark.parametrize("part", ["prior", "tokenizer"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_missing_and_truncated_parts(folder: Path, part: str, file: str) -> None:
    path = folder / part / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=part):
        DARPipeline.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=part):
        DARPipeline.from_pretrained(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON"),
        ("{", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ("[]", "expected _class_name 'DARPipeline', got 'list'"),
        ('{"_class_name": "DiTPipeline"}', "expected _class_name 'DARPipeline', got 'DiTPipeline'"),
        ('{"_class_name": "DARPipeline", "labels": "abc"}', "expected labels to be a list"),
        ('{"_class_name": "DARPipeline", "labels": [1]}', "expected labels to be a list"),
        ('{"_class_name": "DARPipeline", "labels": ["a"]}', "labels: expected 6 names"),
        ('{"_class_name": "DARPipeline", "labels": ["a","a","b","c","d","e"]}', "repeated"),
    ],
    ids=lambda value: value[:30],
)
def test_wrong_indices(folder: Path, text: str, message: str) -> None:
    (folder / "model_index.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        DARPipeline.from_pretrained(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_swapped_parts(folder: Path) -> None:
    (folder / "prior").rename(folder / "x")
    (folder / "tokenizer").rename(folder / "prior")
    (folder / "x").rename(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="expected a Prior, got a Tokenizer"):
        DARPipeline.from_pretrained(folder)


def test_dtypes() -> None:
    assert pick_dtype(None, torch.device("cpu")) == torch.float32
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    with pytest.raises(TypeError, match=r"dtype: expected a torch\.dtype, got str 'fp8'"):
        pick_dtype("fp8", torch.device("cpu"))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"dtype: expected a floating-point dtype, got torch\.int8"
    ):
        pick_dtype(torch.int8, torch.device("cpu"))
