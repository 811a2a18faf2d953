"""Packed weights: the same picture, dropped by whatever changes the weights."""

import copy

import pytest
import torch

from dar_fast.models.layers import Linear, pack
from dar_kernels import packs, prefer

pytestmark = pytest.mark.skipif(
    not packs(torch.ones(2, 2, dtype=torch.bfloat16)), reason="no bf16 products here"
)


def packed(module):
    return [m.packed is not None for m in module.modules() if isinstance(m, Linear)]


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


def test_a_pipeline_packs_where_it_pays(fresh_pipeline):
    assert not any(packed(fresh_pipeline.tokenizer))
    fresh_pipeline.to(dtype=torch.bfloat16)
    assert all(packed(fresh_pipeline.tokenizer.pixel_dit))
    fresh_pipeline.to(dtype=torch.float32)
    assert not any(packed(fresh_pipeline.tokenizer))


def test_what_changes_the_weights_drops_the_copy():
    layer = Linear(8, 8).bfloat16().eval()
    changes = {
        "training": lambda: layer.train(),
        "loading": lambda: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
        "moving": lambda: layer.float().bfloat16(),
    }
    for name, change in changes.items():
        layer.pack()
        assert layer.packed is not None
        change()
        assert layer.packed is None, name
    layer.pack()
    x = torch.randn(3, 8).bfloat16()
    layer(x).sum().backward()  # with gradients the weight itself is used
    assert layer.weight.grad is not None
