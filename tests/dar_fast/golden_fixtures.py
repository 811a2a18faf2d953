"""Models under the golden weights, and what the official implementation made of them."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dar_fast.checkpoint import load_official_prior, load_official_tokenizer, to_official
from dar_fast.config import PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer

FOLDER = Path(__file__).parents[1] / "golden"


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


@cache
def weights() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_weights", FOLDER / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def golden(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return Golden(tensors, json.loads(file.metadata()["config"]))


def _filled(module: nn.Module, salt: int) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in to_official(module).items()}
    weights().fill(state, salt)
    return state


def _prior_config(official: dict[str, Any]) -> PriorConfig:
    return PriorConfig(
        dim=official["dim"], depth=official["n_layer"], heads=official["n_head"],
        vocab_size=official["vocab_size"], num_tokens=official["block_size"],
        num_classes=official["num_classes"],
    )  # fmt: skip


def _tokenizer_config(official: dict[str, Any], resolution: int) -> TokenizerConfig:
    dit = official["diff_decoder"]
    return TokenizerConfig(
        image_size=resolution, patch_size=official["encoder_patch_size"],
        encoder_dim=official["encoder_dim"], encoder_depth=official["num_encoder_layers"],
        decoder_dim=official["decoder_dim"], decoder_depth=official["num_decoder_layers"],
        code_dim=official["vq_dim"], codebook_size=official["vq_codebook_size"],
        num_tokens=official["num_all_queries"], num_groups=official["num_query_groups"],
        num_steps=official["num_denoising_steps"],
        dit=PixelDiTConfig(
            dim=dit["dim"], depth=dit["depth"], patch_size=dit["patch_size"],
            data_std=dit["data_std"], time_shift=dit["time_shift"],
            repa_layer=dit.get("repa_layer", 8),
        ),
    )  # fmt: skip


@cache
def golden_prior(name: str) -> Prior:
    meta = golden(name).meta
    config = _prior_config(meta["config"])
    return load_official_prior(_filled(Prior(config), meta["salt"]), config).eval()


@cache
def golden_tokenizer(name: str) -> Tokenizer:
    meta = golden(name).meta
    config = _tokenizer_config(meta["config"], meta["resolution"])
    return load_official_tokenizer(_filled(Tokenizer(config), meta["salt"]), config).eval()


def input_noise(name: str) -> Tensor:
    """The noise that every recorded decoding starts from."""
    tensors, meta = golden(name)
    R = meta["resolution"]
    shape = (len(tensors["image"]), 3, R, R)
    return torch.from_numpy(weights().normal("input.noise", shape, meta["salt"]))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected."""
    actual, expected = actual.detach().double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def check_gradients(module: nn.Module, name: str) -> None:
    """Every gradient norm and every recorded gradient, after a backward pass.

    Some are zero in exact arithmetic (the key bias under softmax); what rounding leaves of them is
    compared against the gradient of the whole.
    """
    tensors, meta = golden(name)
    gradients = to_official_gradients(module)
    norms = tensors["train.grad_norm"].double()
    floor = 1e-7 * float(norms.norm())
    assert set(gradients) >= set(meta["grad_names"])
    for key, expected in zip(meta["grad_names"], norms.tolist(), strict=True):
        actual = float(gradients[key].double().norm())
        assert abs(actual - expected) <= 1e-5 * expected + floor, f"{key}: {actual} {expected}"
    for key, expected in tensors.items():
        if key.startswith("train.grad."):
            actual = gradients[key.removeprefix("train.grad.")].reshape(expected.shape)
            assert relative_error(actual, expected) <= 1e-5, key


def to_official_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients under official names: zeros where a parameter had none."""
    with torch.no_grad():
        values = [p.detach().clone() for p in module.parameters()]
        for p in module.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        gradients = {name: t.clone() for name, t in to_official(module).items()}
        for p, value in zip(module.parameters(), values, strict=True):
            p.copy_(value)
    return gradients
