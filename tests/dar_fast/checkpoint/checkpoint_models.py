"""Models of a few kilobytes with known weights, for the tests of files."""

import importlib.util
from pathlib import Path

import torch

from dar_fast.checkpoint import to_official
from dar_fast.config import PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_fast.quantization import products

PRIOR = PriorConfig(dim=64, depth=2, heads=1, vocab_size=32, num_tokens=16, num_classes=3)
TOKENIZER = TokenizerConfig(
    image_size=32, patch_size=8, encoder_dim=64, encoder_depth=1, decoder_dim=128, decoder_depth=2,
    codebook_size=32, num_tokens=16, num_groups=4, num_steps=3, query_table=20,
    dit=PixelDiTConfig(dim=64, depth=2, patch_size=4, repa_layer=1, data_std=0.5, time_shift=1.5),
)  # fmt: skip
OFFICIAL_PRIOR = {
    "dim": 64, "n_layer": 2, "n_head": 1, "vocab_size": 32, "block_size": 16, "num_classes": 3,
}  # fmt: skip
OFFICIAL_TOKENIZER = {
    "encoder_patch_size": 8, "num_encoder_layers": 1, "num_decoder_layers": 2,
    "query_low_rank": True, "encoder_dim": 64, "decoder_dim": 128, "vq_dim": 8,
    "vq_codebook_size": 32, "num_denoising_steps": 3, "num_query_groups": 4, "num_all_queries": 16,
    "queries_per_step": 4, "vq_enable": True, "image_size": 32,
    "diff_decoder": {
        "in_dim": 3, "out_dim": 3, "dim": 64, "cond_dim": 128, "patch_size": 4, "depth": 2,
        "data_std": 0.5, "time_shift": 1.5, "mlp_head": False, "share_time_encoding": False,
        "repa_layer": 1, "grad_checkpointing": False,
    },
}  # fmt: skip

_spec = importlib.util.spec_from_file_location(
    "golden_weights", Path(__file__).parents[2] / "golden" / "weights.py"
)
weights = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(weights)


def official_state(config, salt=1):
    """The official state dict of a model with the golden fixtures' weights."""
    module = Prior(config) if isinstance(config, PriorConfig) else Tokenizer(config)
    state = to_official(module)
    weights.fill(state, salt)
    return state


def same(a, b):
    """Whether two state dicts hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_operands(a, b):
    """Whether two priors keep the same bytes and scales; there is no == of float8."""
    ours, theirs = (
        [
            part
            for name, product in sorted(products(prior).items())
            for part in (product.quantized.values.view(torch.uint8), product.quantized.scale)
        ]
        for prior in (a, b)
    )
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
