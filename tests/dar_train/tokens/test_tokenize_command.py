"""`dar tokenize`: what it writes and says, what it refuses, many processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dar_fast.checkpoint import load_model
from dar_fast.cli import main
from dar_fast.config import TokenizerConfig
from dar_fast.models import Tokenizer
from dar_train.data import load_pictures, to_float
from dar_train.export import export_component
from dar_train.tokens import open_store


@pytest.fixture
def tokenizer(model_files, tmp_path) -> Path:
    torch.manual_seed(0)
    config = TokenizerConfig.from_dict(_values(model_files))
    return export_component(Tokenizer(config, 0.1), tmp_path / "tokenizer")


def _values(model_files) -> dict[str, object]:
    return json.loads(Path(model_files["tokenizer"]).read_text())


@pytest.fixture
def line(tokenizer, pictures, tmp_path) -> list[str]:
    return [
        "tokenize", "--tokenizer", str(tokenizer), "--data", str(pictures),
        "--out", str(tmp_path / "tokens"), "--workers", "0", "--batch", "8", "--device", "cpu",
    ]  # fmt: skip


def test_codes_are_the_tokenizers(line, tokenizer, pictures, tmp_path, capsys) -> None:
    assert main([*line, "--flip"]) == 0
    said = capsys.readouterr().out
    assert "encoded 20 pictures, 40 views, in" in said
    assert "encodings/s" in said
    assert "complete, 2 views of 20 pictures, 8 codes each" in said
    model, images = load_model(tokenizer, dtype=torch.float32), load_pictures(pictures, 16).images
    store = open_store(tmp_path / "tokens")
    every = torch.arange(20)
    assert torch.equal(store.rows(0, every), model.encode(to_float(images)))
    assert torch.equal(store.rows(1, every), model.encode(to_float(images.flip(-1))))
    assert store.labels.tolist() == [0] * 10 + [1] * 10

    assert main([*line, "--flip"]) == 0
    said = capsys.readouterr().out
    assert "encoded" not in said
    assert "complete, 2 views" in said


def test_a_complete_folder_is_checked(line, tmp_path, capsys) -> None:
    assert main(line) == 0
    codes = np.load(tmp_path / "tokens" / "codes.npy", mmap_mode="r+")
    codes[0, 19, 0] ^= 1
    codes.flush()
    assert main(line) == 2
    assert "other codes or labels of pictures 16 to 19" in capsys.readouterr().err


def test_ten_crops_and_unreadable_pictures(line, pictures, tmp_path, capsys) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    for i in range(7):
        (data / "left" / f"{i}.png").write_bytes(b"no picture")
    line[4] = str(data)
    assert main([*line, "--ten-crop"]) == 0
    said = capsys.readouterr().out
    assert "complete, 10 views of 20 pictures" in said
    assert "left out 7 pictures that could not be read:" in said
    assert "left/0.png: not a picture that Pillow knows" in said
    assert "and 2 more, in" in said
    assert len(open_store(tmp_path / "tokens").manifest.skipped) == 7


def test_bf16_is_another_manifest(line, capsys) -> None:
    assert main([*line, "--precision", "bf16"]) == 0
    assert main(line) == 2
    assert "holds others: precision: expected fp32, got bf16;" in capsys.readouterr().err


def test_help_names_every_flag(capsys) -> None:
    assert main(["tokenize", "--help"]) == 0
    said = capsys.readouterr().out
    for flag in ("tokenizer", "data", "out", "ten-crop", "flip", "moves", "batch", "precision"):
        assert f"--{flag}" in said
    assert main(["--help"]) == 0
    assert "tokenize " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"--tokenizer": "none"},
            "tokenizer: expected the folder of a trained tokenizer, got none",
        ),
        ({"--data": "none"}, "data: expected"),
        ({"--batch": "0"}, "batch: expected at least 1, got 0"),
        ({"--workers": "-1"}, "workers: expected at least 0, got -1"),
        ({"--moves": "-2"}, "moves: expected at least 0, got -2"),
        ({"--seed": "-1"}, "seed: expected at least 0, got -1"),
        ({"--batch": "many"}, "--batch: expected an integer, got 'many'"),
        ({"--precision": "fp16"}, "--precision: expected one of 'bf16', 'fp32', got 'fp16'"),
        ({"--device": "tpu"}, "device: expected one such as 'cpu' or 'cuda', got 'tpu'"),
        ({"--tenc": "1"}, "--tenc"),
    ],
)
def test_bad_usage(line, changes, text, tmp_path, capsys) -> None:
    for flag, value in changes.items():
        if flag in line:
            line[line.index(flag) + 1] = value
        else:
            line += [flag, value]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "tokens").exists()


def test_required_flags_are_named(capsys) -> None:
    assert main(["tokenize"]) == 2
    assert "--tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_what_one_writes(line, tmp_path) -> None:
    assert main([*line, "--flip", "--moves", "1"]) == 0
    shared = [*line, "--flip", "--moves", "1"]
    shared[shared.index("--out") + 1] = str(tmp_path / "shared")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "dar_fast.cli", *shared],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        )
        for rank in (1, 0)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    for name in ("codes.npy", "labels.npy", "held_out.npy", "manifest.json"):
        written = (tmp_path / "shared" / name).read_bytes()
        assert written == (tmp_path / "tokens" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == [
        "codes.npy", "held_out.npy", "labels.npy", "manifest.json"
    ]  # fmt: skip


def test_a_missing_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "dar_train.tokens.command", None)
    assert main(["tokenize", "--help"]) == 1
    error = capsys.readouterr().err
    assert "dar tokenize: expected the packages of the extra 'train'" in error
    assert "pip install 'dar-fast[train]'" in error
