"""The optional losses say what is missing."""

import sys

import pytest
import torch

from dar_train.losses import alignment_loss, perceptual_loss

BOTH = pytest.mark.parametrize(
    ("make", "field", "package"),
    [(perceptual_loss, "lpips_weights", "lpips"), (alignment_loss, "repa_weights", "timm")],
    ids=["lpips", "repa"],
)
CPU = torch.device("cpu")


@BOTH
def test_missing_file(make, field, package, tmp_path) -> None:
    with pytest.raises(ValueError, match=f"{field}: expected a weights file, got"):
        make(tmp_path / "none.pth", CPU)


@BOTH
def test_damaged_file(make, field, package, tmp_path) -> None:
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not weights")
        with pytest.raises(ValueError, match=f"{field}: expected readable weights in"):
            make(tmp_path / name, CPU)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=f"{field}: expected a state dict in .*, got list"):
        make(tmp_path / "list.pth", CPU)


@BOTH
def test_missing_package(make, field, package, tmp_path, monkeypatch) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{field}: the package {package} is missing: pip install"):
        make(tmp_path / "x.pth", CPU)
