"""The recorded training steps by every back end of attention, compiled, recomputed, truncated."""

import copy
from collections.abc import Iterator

import pytest
import torch
from golden_fixtures import (
    check_gradients,
    golden,
    golden_prior,
    golden_tokenizer,
    relative_error,
    to_official_gradients,
)
from torch import Tensor, nn

from dar_fast.models import Prior
from dar_kernels import UnavailableError, prefer
from dar_kernels.attention import OP
from dar_train.recompute import recompute

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("none", "selective", "full")
NAMES = ("tokenizer_tiny", "tokenizer_k4", "prior_tiny")
BACK_ENDS = [implementation.name for implementation in OP.implementations]
PARTS = ("fm", "vq", "commit")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model_of(name: str) -> nn.Module:
    made = golden_prior(name) if name.startswith("prior") else golden_tokenizer(name)
    return copy.deepcopy(made).to(DEVICE).train()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, Prior):
        return list(model.blocks())
    stacks = model.encoder.layers, model.token_decoder.layers, model.pixel_dit.blocks
    return [block for stack in stacks for block in stack]


def losses(model: nn.Module, name: str, tokens: int | None = None) -> dict[str, Tensor]:
    recorded = {key: tensor.to(DEVICE) for key, tensor in golden(name).tensors.items()}
    if isinstance(model, Prior):
        return {"loss": model.loss(recorded["tokens"].long(), recorded["labels"].long())}
    time = recorded["train.time"]
    if tokens is not None:
        tokens += int(model.drawn(time)[1].max()) + model.config.group_size
    out = model.training_forward(
        recorded["image"], time, recorded["train.noise"], tokens=tokens, align=tokens is None
    )
    if tokens is None:
        assert relative_error(out.repa[:, ::16], recorded["train.repa"]) <= 1e-5
    return {part: getattr(out, part) for part in PARTS}


def expected(name: str, part: str) -> float:
    key = "train.loss" if part == "loss" else f"train.loss.{part}"
    return float(golden(name).tensors[key])


def check(model: nn.Module, name: str, tokens: int | None = None) -> None:
    found = losses(model, name, tokens)
    for part, value in found.items():
        assert float(value.detach()) == pytest.approx(expected(name, part), rel=1e-5), part
    torch.stack(list(found.values())).sum().backward()
    check_gradients(model.cpu(), name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_back_ends_in_fp32(back_end, name, mode) -> None:
    try:
        with prefer(back_end, op="attention"):
            model = model_of(name)
            recompute(blocks_of(model), mode)
            check(model, name)
    except UnavailableError as error:
        pytest.skip(str(error))


def norms_under_autocast(name: str, back_end: str) -> Tensor:
    """Loss parts, then the norm of every recorded gradient."""
    model = model_of(name)
    recorded = golden(name)
    with prefer(back_end, op="attention"):
        with torch.autocast(DEVICE, torch.bfloat16):
            tokens = None if isinstance(model, Prior) else 0
            found = losses(model, name, tokens)
        torch.stack(list(found.values())).sum().backward()
    gradients = to_official_gradients(model.cpu())
    norms = [gradients[key].double().norm().cpu() for key in recorded.meta["grad_names"]]
    return torch.stack([*(value.detach().double().cpu() for value in found.values()), *norms])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_back_ends_in_bf16(back_end, name) -> None:
    """No further from the record than the definition of attention in bf16 is."""
    recorded = golden(name)
    parts = ["loss"] if name.startswith("prior") else list(PARTS)
    norms = recorded.tensors["train.grad_norm"].double()
    truth = torch.cat((torch.tensor([expected(name, part) for part in parts]).double(), norms))
    try:
        actual = norms_under_autocast(name, back_end)
    except UnavailableError as error:
        pytest.skip(str(error))
    allowed = relative_error(norms_under_autocast(name, "reference"), truth)
    assert allowed < 0.05
    assert relative_error(actual, truth) <= 2 * allowed + 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("more", [0, 8], ids=["least", "more"])
@pytest.mark.parametrize("name", NAMES[:2])
def test_tokens_behind_the_draws_are_left_out(name, more, mode) -> None:
    model = model_of(name)
    time = golden(name).tensors["train.time"]
    least = int(model.drawn(time)[1].max()) + model.config.group_size
    if least + more > model.config.num_tokens:
        pytest.skip(f"the record draws tokens up to {least}")
    recompute(blocks_of(model), mode)
    check(model, name, more)


INDUCTOR = [("prior_tiny", "selective"), ("tokenizer_tiny", "none")]  # minutes each
COMPILED = [("aot_eager", name, mode) for name in NAMES for mode in MODES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "name", "mode"), [*COMPILED, *(("inductor", *case) for case in INDUCTOR)]
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_blocks(name, mode, backend) -> None:
    model = model_of(name)
    blocks = blocks_of(model)
    recompute(blocks, mode)
    for block in blocks:
        dynamic = getattr(block, "dynamic", False)
        if backend != "inductor" or not dynamic:  # as `parallelize` has it on a CPU
            block.compile(dynamic=dynamic, backend=backend)
    check(model, name)
