"""Blocks that recompute: the same gradients, fewer bytes kept, in the promised order."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dar_fast.config import PriorConfig
from dar_fast.models import Prior, Tokenizer
from dar_kernels import attention_native
from dar_train.recompute import is_kept, recompute
from tiny_models import TINY_TOKENIZER, perturb

MODES = ("none", "selective", "full")


class Kept(TorchDispatchMode):
    """Bytes of results that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                self.made[storage.data_ptr()] = weakref.ref(storage), storage.nbytes()
        return results

    def bytes(self) -> int:
        gc.collect()
        return sum(size for storage, size in self.made.values() if storage() is not None)


def tokenizer_loss(model: Tokenizer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 2, 3, 16, 16, generator=generator)
    out = model.training_forward(images, torch.tensor([0.2, 0.6]), noise, tokens=12)
    return out.fm + out.vq + out.commit


def prior_loss(model: Prior) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(64, (2, 16), generator=generator)
    torch.manual_seed(3)  # dropout
    return model.loss(codes, torch.tensor([1, 2]))


@pytest.fixture(scope="module")
def made() -> dict[str, nn.Module]:
    tokenizer = Tokenizer(TINY_TOKENIZER)
    prior = Prior(
        PriorConfig(dim=32, depth=2, heads=2, vocab_size=64, num_tokens=16, num_classes=6),
        dropout=0.1,
    )
    for model in (tokenizer, prior):
        perturb(model, 4)
    return {"tokenizer": tokenizer.train(), "prior": prior.train()}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def measured(model: nn.Module, precision: str) -> tuple[int, dict[str, torch.Tensor]]:
    loss_of = tokenizer_loss if isinstance(model, Tokenizer) else prior_loss
    with Kept() as kept, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = loss_of(model)
    alive = kept.bytes()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return alive, gradients


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["tokenizer", "prior"])
def test_same_gradients_of_fewer_bytes(made, name, precision) -> None:
    sizes, results = [], []
    for mode in MODES:
        model = copy.deepcopy(made[name])
        recompute(blocks_of(model), mode)
        size, gradients = measured(model, precision)
        sizes.append(size)
        results.append(gradients)
    for gradients in results[1:]:
        assert gradients.keys() == results[0].keys()
        assert [n for n in gradients if not torch.equal(gradients[n], results[0][n])] == []
    assert sizes[2] < 0.6 * sizes[0]
    assert sizes[2] < sizes[1] < 0.85 * sizes[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_compiled_blocks_agree(made, mode) -> None:
    torch._dynamo.reset()
    plain, compiled = (copy.deepcopy(made["tokenizer"]) for _ in range(2))
    blocks = blocks_of(compiled)
    recompute(blocks, mode)
    for block in blocks:
        block.compile(backend="aot_eager", dynamic=getattr(block, "dynamic", False))
    torch._dynamo.utils.counters.clear()
    for model in (plain, compiled):
        tokenizer_loss(model).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_copies_and_evaluation(made) -> None:
    model = copy.deepcopy(made["tokenizer"])
    recompute(blocks_of(model), "full")
    again = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        image = torch.randn(1, 3, 16, 16)
        expected = made["tokenizer"].pre_quantize(image)
        assert torch.equal(again.pre_quantize(image), expected)  # not with the first one's weights
    assert list(again.state_dict()) == list(made["tokenizer"].state_dict())


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("aten::mm", True), ("aten::addmm", True), ("aten::bmm", False),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True),
        ("dar::adaln_cross_attention", True), ("flash_attn::_flash_attn_forward", True),
        ("aten::native_layer_norm", False), ("dar::layer_norm", False), ("aten::silu", False),
        ("aten::mul.Tensor", False), ("dar::adaln_modulate", True),  # a product of 12 D^2
    ],
)  # fmt: skip
def test_what_selective_keeps(name, kept) -> None:
    assert is_kept(name) is kept


def test_unknown_mode() -> None:
    with pytest.raises(ValueError, match=r"recompute: expected one of .*, got 'some'"):
        recompute([], "some")  # type: ignore[arg-type]


def test_attention_of_the_cpu_runs_once(monkeypatch) -> None:
    """Where "selective" recomputes, it keeps the result of attention by C++ as well."""
    reason = attention_native.missing()
    if reason is not None:
        pytest.skip(reason)
    runs, real = [], attention_native._forward
    monkeypatch.setattr(attention_native, "_forward", lambda *a: runs.append(1) or real(*a))
    block = blocks_of(Tokenizer(TINY_TOKENIZER))[0]
    counts, x = {}, torch.randn(1, 6, 32, requires_grad=True)
    for mode in MODES:
        runs.clear()
        again = copy.deepcopy(block)
        recompute([again], mode)
        with torch.autocast("cpu", torch.bfloat16):
            again(x, prefix=0).sum().backward()
        counts[mode] = len(runs)
    assert counts == {"none": 1, "selective": 1, "full": 2}
