"""A feature network of one's own: what is written is what runs, and nothing else runs."""

import json
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dar_train.feature_network import FORMAT, load_feature_network, save_feature_network
from dar_train.losses import feature_loss

MEAN, STD = (0.1, -0.2, 0.3), (0.5, 0.6, 0.7)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2, dilation=2, padding=2, groups=4, bias=False), nn.SiLU(),
        nn.AvgPool2d(2, padding=1), nn.GELU(), nn.Tanh(),
    )  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "network.safetensors"
    save_feature_network(chain(), [1, 4, 7], path, MEAN, STD)
    return path


def expected_distance(images, predicted) -> torch.Tensor:
    total = torch.zeros((), dtype=images.dtype)
    x, y = images, predicted
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    x, y = (x - mean) / std, (y - mean) / std
    for i, module in enumerate(chain()):
        x, y = module(x), module(y)
        if i in (1, 4, 7):
            difference = F.normalize(x, dim=1) - F.normalize(y, dim=1)
            total = total + difference.square().sum(1).mean() / 3
    return total


def test_the_loss_is_the_modules(file) -> None:
    images, predicted = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    predicted.requires_grad_()
    loss = feature_loss(file, 16, torch.device("cpu"))
    actual = loss(images, predicted)
    torch.testing.assert_close(actual, expected_distance(images, predicted))
    (given,) = torch.autograd.grad(actual, predicted)
    (wanted,) = torch.autograd.grad(expected_distance(images, predicted), predicted)
    torch.testing.assert_close(given, wanted)
    assert float(loss(images, images)) == 0


def test_draws_share_the_pictures(file) -> None:
    images, predicted = torch.rand(2, 3, 16, 16), torch.rand(4, 3, 16, 16)
    loss = feature_loss(file, 16, torch.device("cpu"))
    torch.testing.assert_close(loss(images, predicted), loss(images.repeat(2, 1, 1, 1), predicted))


@pytest.mark.parametrize(
    ("modules", "outputs", "message"),
    [
        ([nn.BatchNorm2d(3)], [0], r"network\.0: expected Conv2d .*, got BatchNorm2d"),
        ([nn.Conv2d(3, 3, (1, 3))], [], "outputs: expected indices below 1"),
        ([nn.MaxPool2d((2, 1))], [0], r"network\.0: expected one size for both sides"),
        ([nn.ReLU()], [1], r"outputs: expected indices below 1, got \[1\]"),
        ([nn.Conv2d(3, 3, 3, padding_mode="reflect")], [0], "expected Conv2d with zero padding"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(modules, outputs, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        save_feature_network(nn.Sequential(*modules), outputs, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


OUTPUT = {"kind": "output"}
DESCRIPTIONS = {
    "no output": [{"kind": "relu"}],
    "unknown kind": [{"kind": "__import__"}, OUTPUT],
    "no object": ["relu", OUTPUT],
    "unknown option": [{"kind": "relu", "inplace": 1}, OUTPUT],
    "text for a size": [{"kind": "max_pool", "size": "2"}, OUTPUT],
    "no size": [{"kind": "max_pool"}, OUTPUT],
    "huge": [{"kind": "max_pool", "size": 2**20}, OUTPUT],
    "no such tensor": [{"kind": "conv", "name": "lost"}, OUTPUT],
    "another width": [{"kind": "conv", "name": "wide"}, OUTPUT],
    "pool of a picture too small": [{"kind": "avg_pool", "size": 64}, OUTPUT],
}


@pytest.mark.parametrize("layers", DESCRIPTIONS.values(), ids=list(DESCRIPTIONS))
def test_bad_descriptions(layers, tmp_path) -> None:
    network = {"layers": layers, "mean": [0, 0, 0], "std": [1, 1, 1]}
    path = tmp_path / "bad.safetensors"
    metadata = {"format": FORMAT, "network": json.dumps(network)}
    save_file({"wide.weight": torch.zeros(4, 5, 1, 1)}, path, metadata)
    with pytest.raises(ValueError, match=r"perceptual: expected a network in .*bad\.safetensors"):
        load_feature_network(path, 16)


@pytest.mark.parametrize(
    "metadata",
    [
        None, {"format": FORMAT}, {"format": FORMAT, "network": "{"},
        {"format": FORMAT, "network": "[]"},
        {"format": FORMAT, "network": '{"layers": [{"kind": "output"}], "mean": 1, "std": []}'},
    ],
)  # fmt: skip
def test_bad_metadata(metadata, tmp_path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(ValueError, match="perceptual: expected a network in"):
        load_feature_network(tmp_path / "x.safetensors", 16)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("a file was executed",)


def test_nothing_is_unpickled(tmp_path) -> None:
    program = tmp_path / "network.pt2"
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("network/data.pkl", pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"perceptual: expected a \.safetensors file"):
        load_feature_network(program, 16)
    renamed = program.rename(tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="perceptual: expected readable weights"):
        load_feature_network(renamed, 16)
