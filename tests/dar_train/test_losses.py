"""The optional losses: what they say is missing, by stand-ins, and with the networks themselves.

The real networks' weights are random: no trained ones can be had where the tests run.
"""

import sys
from importlib import import_module
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dar_train.losses import alignment_loss, import_torchvision, perceptual_loss

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


class Dino(nn.Module):
    """Stands in for timm's: patch features are channel means of 14 x 14 patches, repeated."""

    num_prefix_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        means = F.avg_pool2d(x, 14).flatten(2).transpose(1, 2).repeat(1, 1, 256)  # [B, 256, 768]
        return torch.cat((torch.full_like(means[:, :1], 9.0), self.scale * means), dim=1)


def test_alignment_reads_each_picture_once(tmp_path, monkeypatch) -> None:
    network = Dino()
    timm = ModuleType("timm")
    timm.create_model = lambda *args, **kwargs: network  # type: ignore[attr-defined]
    transformer = ModuleType("timm.models.vision_transformer")
    transformer.checkpoint_filter_fn = lambda state, model: state  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", ModuleType("timm.models"))
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", transformer)
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "dino.pth")
    loss = alignment_loss(tmp_path / "dino.pth", CPU)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    heads = torch.randn(4, 256, 768, requires_grad=True)
    actual = loss(images, heads)
    assert [tuple(x.shape) for x in network.seen] == [(2, 3, 224, 224)]
    mean, std = network.seen[0].mean((2, 3)), images.mean((2, 3))
    normal = (std + 1) / 2 - torch.tensor([0.485, 0.456, 0.406])
    torch.testing.assert_close(
        mean, normal / torch.tensor([0.229, 0.224, 0.225]), atol=0.05, rtol=0
    )
    with torch.no_grad():
        target = network.forward_features(network.seen[0])[:, 1:]
    expected = 1 - F.cosine_similarity(heads, target.repeat(2, 1, 1), dim=-1).mean()
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert heads.grad is not None and network.scale.grad is None


class Lpips(nn.Module):
    """Stands in for lpips': the mean absolute difference after the first slice."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.net = nn.Module()
        for i in range(1, 6):
            slice_ = nn.Module()
            slice_.add_module(str(i), nn.Conv2d(3, 3, 1, bias=False))
            setattr(self.net, f"slice{i}", slice_)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        layer = self.net.get_submodule("slice1.1")
        return (layer(a) - layer(b)).abs().mean((1, 2, 3), keepdim=True)


def test_perceptual_takes_the_trunk_and_shares_pictures(tmp_path, monkeypatch) -> None:
    lpips = ModuleType("lpips")
    lpips.LPIPS = Lpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    weights = {f"features.{i}.weight": torch.eye(3)[..., None, None] * i for i in range(1, 6)}
    torch.save(weights, tmp_path / "vgg.pth")
    loss = perceptual_loss(tmp_path / "vgg.pth", CPU)
    images, predicted = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 8, 8, requires_grad=True)
    actual = loss(images, predicted)
    torch.testing.assert_close(actual, (images.repeat(2, 1, 1, 1) - predicted).abs().mean())
    actual.backward()
    assert predicted.grad is not None
    del weights["features.3.weight"]
    torch.save(weights, tmp_path / "vgg.pth")
    with pytest.raises(ValueError, match=r"lpips_weights: expected features\.3\.weight in"):
        perceptual_loss(tmp_path / "vgg.pth", CPU)


def test_lpips_itself_over_a_trunk_from_a_file(tmp_path) -> None:
    import_torchvision()
    vgg = import_module("torchvision.models").vgg16(init_weights=False).features[:30]
    trunk = {f"features.{name}": x for name, x in vgg.state_dict().items()}
    for name, x in trunk.items():  # activations neither grow nor vanish
        x.normal_(std=(2 / (9 * x.shape[1])) ** 0.5) if name.endswith("weight") else x.zero_()
    save_file(trunk, tmp_path / "vgg.safetensors")
    loss = perceptual_loss(tmp_path / "vgg.safetensors", CPU)
    images, predicted = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    assert float(loss(images, images)) == 0
    near = torch.lerp(images, predicted, 0.1).requires_grad_()
    small, large = loss(images, near), loss(images, predicted)
    assert 0 < float(small.detach()) < float(large)
    small.backward()
    with torch.no_grad():  # downhill is towards the picture
        assert float((near.grad * (images - near)).sum()) < 0


@pytest.mark.slow
def test_timms_dinov2_itself_from_a_file(tmp_path) -> None:
    import_torchvision()
    torch.manual_seed(0)
    create = import_module("timm").create_model
    network = create("vit_base_patch14_dinov2", img_size=224, num_classes=0).eval()
    save_file(network.state_dict(), tmp_path / "dino.safetensors")
    loss = alignment_loss(tmp_path / "dino.safetensors", CPU)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        patches = network.forward_features(((images + 1) / 2 - mean) / std)[:, 1:]
    assert patches.shape == (2, 256, 768)
    assert float(loss(images, 3 * patches)) == pytest.approx(0, abs=1e-5)
    assert float(loss(images, -patches)) == pytest.approx(2, abs=1e-5)
    assert 0.5 < float(loss(images, torch.randn_like(patches))) < 1.5
