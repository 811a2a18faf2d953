"""A saved tiny model, a working folder, a picture, and `dar` called in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from dar_fast import DARPipeline
from dar_fast.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(scope="session")
def model(tiny_pipeline: DARPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(here: Path) -> Path:
    """A 16x16 picture in the working folder: it fits the tiny model."""
    rows = np.linspace(0, 255, 16, dtype=np.uint8)
    pixels = np.stack(
        np.broadcast_arrays(rows[:, None], rows[None], np.full((16, 16), 90, np.uint8)), axis=-1
    )
    path = here / "cat.png"
    Image.fromarray(pixels).save(path)
    return Path(path.name)


@pytest.fixture
def dar(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`dar(*argv)` in the working folder: status, stdout and stderr."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        status = main([str(a) for a in argv])
        return Result(status, *capsys.readouterr())

    return call
