"""The wheel holds every package; built without a compiler, it says why the C++ ops are missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "dar_fast", "kernels", "train",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the wheel is built from: other tests may write beside the originals."""
    folder = tmp_path_factory.mktemp("wheel") / "source"
    folder.mkdir()
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(path, folder / name, ignore=ignore)
        else:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    """The text of each file of the wheel, built where no compiler works."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--wheel-dir", str(source.parent), str(source)]
    environment = os.environ | {"CXX": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = source.parent.glob("dar_fast-*.whl")
    with zipfile.ZipFile(path) as archive:
        return {
            info.filename: archive.read(info).decode("utf-8", "replace")
            for info in archive.infolist()
        }


@pytest.mark.slow
def test_wheel_holds_every_file_of_every_package(source, wheel):
    for package in ("dar_fast", "kernels/dar_kernels", "train/dar_train"):
        folder = source / package
        files = {str(p.relative_to(folder.parent)) for p in folder.rglob("*") if p.is_file()}
        missing = files - set(wheel)
        assert files
        assert not missing


@pytest.mark.slow
def test_wheel_brings_the_command(wheel):
    (entry_points,) = (text for name, text in wheel.items() if name.endswith("entry_points.txt"))
    assert "dar=dar_fast.cli:main" in entry_points.replace(" ", "")


@pytest.mark.slow
def test_wheel_without_a_compiler_says_so(wheel):
    assert not [name for name in wheel if name.endswith(".so")]
    assert "no working C++ compiler" in wheel["dar_kernels/_native_missing.txt"]
