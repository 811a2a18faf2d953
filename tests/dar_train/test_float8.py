"""Training products in float8: which layers, what is missing, and torchao's numbers where it is."""

import copy
import sys
from types import ModuleType

import pytest
import torch

from dar_fast.models import Prior, Tokenizer
from dar_fast.models.layers import Linear
from dar_fast.models.quantized import Product
from dar_train import float8
from dar_train.float8 import Float8Linear, Float8Product, convert, float8_missing
from tiny_models import TINY_PRIOR, TINY_TOKENIZER, perturb

CPU = torch.device("cpu")


class Halves(torch.nn.Module):
    """In place of torchao's layer: a product of halved numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight.t()) / 2  # type: ignore[operator]


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """A torchao whose product is half the right one."""

    def rounded(emulate: bool) -> torch.nn.Module:
        layer = Halves()
        layer.weight = torch.nn.Parameter(torch.empty(0, device="meta"))
        return layer

    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(float8, "_rounded", rounded)


@pytest.fixture
def prior() -> Prior:
    model = Prior(TINY_PRIOR)
    perturb(model, 1)
    return model


def test_what_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert "pip install 'dar-fast[float8]'" in str(float8_missing(CPU))
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    assert float8_missing(CPU) == "runs on cuda only, got cpu"
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert float8_missing(gpu) == "needs a GPU of compute capability 8.9 or more, got 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert float8_missing(gpu) is None


def test_it_is_refused_where_it_cannot_run(prior, monkeypatch, stand_in) -> None:
    with pytest.raises(ValueError, match="float8: runs on cuda only, got cpu"):
        convert(prior.layers, CPU)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match="float8: needs torchao"):
        convert(prior.layers, CPU, emulate=True)


def test_large_products_of_blocks_only(prior, stand_in) -> None:
    names = list(prior.state_dict())
    assert convert(prior.layers, CPU, emulate=True) == 10
    kinds = {name: type(part) for name, part in prior.named_modules()}
    assert kinds["layers.0.mlp.down"] is Float8Product
    assert kinds["head"] is Product
    assert list(prior.state_dict()) == names
    odd = torch.nn.ModuleList([Linear(16, 24), Linear(24, 16), Linear(16, 32)])
    assert convert([odd], CPU, emulate=True) == 1
    assert [type(part) for part in odd] == [Linear, Linear, Float8Linear]


def test_only_passes_with_gradients_differ(prior, stand_in) -> None:
    plain = copy.deepcopy(prior)
    convert(prior.layers, CPU, emulate=True)
    codes, labels = torch.arange(32).view(2, 16), torch.tensor([1, 2])
    with torch.no_grad():
        assert torch.equal(prior.loss(codes, labels), plain.loss(codes, labels))
    assert not torch.allclose(prior.loss(codes, labels), plain.loss(codes, labels))
    drawn = copy.deepcopy(prior).eval().generate(labels, seeds=3)
    assert torch.equal(drawn, plain.eval().generate(labels, seeds=3))


def test_bias_and_activation(stand_in) -> None:
    layer = Linear(16, 16)
    plain = copy.deepcopy(layer)
    convert([torch.nn.ModuleList([layer])], CPU, emulate=True)
    x = torch.randn(3, 16)
    halved = x @ plain.weight.t() / 2 + plain.bias
    torch.testing.assert_close(layer(x), halved)
    torch.testing.assert_close(layer(x, "silu"), torch.nn.functional.silu(halved))


def test_torchao_in_emulation(prior) -> None:
    pytest.importorskip("torchao.float8")
    plain = copy.deepcopy(prior)
    convert(prior.layers, CPU, emulate=True)
    codes, labels = torch.arange(32).view(2, 16), torch.tensor([1, 2])
    rounded, exact = prior.loss(codes, labels), plain.loss(codes, labels)
    rounded.backward()
    exact.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert rounded.item() != exact.item()
    for ours, right in zip(prior.parameters(), plain.parameters(), strict=True):
        assert (ours.grad - right.grad).norm() < 0.6 * right.grad.norm()  # e5m2 has two bits


def test_torchao_in_the_tokenizer() -> None:
    pytest.importorskip("torchao.float8")
    model = Tokenizer(TINY_TOKENIZER)
    assert convert([*model.encoder.layers, *model.pixel_dit.blocks], CPU, emulate=True) > 8
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 3, 16, 16, generator=generator)
    out = model.training_forward(noise.clamp(-1, 1), torch.rand(2, generator=generator), noise)
    (out.fm + out.vq).backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.layers.parameters())
