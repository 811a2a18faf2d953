"""Packed weights, and those in fp8: nearly the same picture, dropped by what changes weights."""

import copy

import pytest
import torch

from dar_fast.models.layers import Linear, pack
from dar_kernels import Fp8Weight, packs, prefer

packing = pytest.mark.skipif(
    not packs(torch.ones(2, 2, dtype=torch.bfloat16)), reason="no bf16 products here"
)


def packed(module):
    return [m.packed is not None for m in module.modules() if isinstance(m, Linear)]


@packing
@torch.no_grad()
def test_a_packed_model_is_no_less_accurate(fresh_pipeline):
    dit = fresh_pipeline.tokenizer.pixel_dit.bfloat16()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator).bfloat16()
    cond = torch.randn(2, 4, 32, generator=generator).bfloat16()
    t = torch.tensor([0.1, 0.7])
    truth = copy.deepcopy(dit).double()(x.double(), t, cond.double()).velocity
    with prefer("torch"):
        plain = dit(x, t, cond).velocity
    pack(dit)
    assert all(packed(dit))
    error = (dit(x, t, cond).velocity.double() - truth).norm()
    assert error <= 2 * (plain.double() - truth).norm()


@packing
def test_a_pipeline_packs_where_it_pays(fresh_pipeline):
    assert not any(packed(fresh_pipeline.tokenizer))
    fresh_pipeline.to(dtype=torch.bfloat16)
    assert all(packed(fresh_pipeline.tokenizer.pixel_dit))
    fresh_pipeline.to(dtype=torch.float32)
    assert not any(packed(fresh_pipeline.tokenizer))


@pytest.mark.parametrize("dtype", [pytest.param("as given", marks=packing), "fp8"])
def test_what_changes_the_weights_drops_the_copy(dtype):
    layer = Linear(16, 16).bfloat16().eval()
    changes = {
        "training": lambda: layer.train(),
        "loading": lambda: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
        "moving": lambda: layer.float().bfloat16(),
    }
    for name, change in changes.items():
        layer.pack(dtype)
        assert layer.packed is not None
        change()
        assert layer.packed is None, name
    layer.pack(dtype)
    x = torch.randn(3, 16).bfloat16()
    layer(x).sum().backward()  # with gradients the weight itself is used
    assert layer.weight.grad is not None


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_large_products_in_fp8(fresh_pipeline, dtype, compiled):
    dit = fresh_pipeline.tokenizer.pixel_dit.to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
    cond, t = torch.randn(2, 4, 32, generator=generator).to(dtype), torch.tensor([0.1, 0.7])
    plain = dit(x, t, cond).velocity.float()
    dit.pack("fp8")
    names = [n for n, m in dit.named_modules() if isinstance(getattr(m, "packed", None), Fp8Weight)]
    assert len(names) == 7 * len(dit.blocks)
    assert not any("cross_attention" in name or "conv" in name for name in names)
    if compiled:
        dit.compile(fullgraph=True, backend="eager")
    error = (dit(x, t, cond).velocity.float() - plain).norm() / plain.norm()
    assert 1e-3 < error < 0.15  # 4 % a product; the tiny weights are large
    dit.pack()
    assert not any(isinstance(m.packed, Fp8Weight) for m in dit.modules() if isinstance(m, Linear))


def test_an_unknown_dtype_is_named(fresh_pipeline):
    with pytest.raises(ValueError, match="expected dtype 'as given' or 'fp8', got 'fp4'"):
        fresh_pipeline.tokenizer.pixel_dit.pack("fp4")
