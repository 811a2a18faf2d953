"""Models small enough that a picture takes milliseconds."""

import torch

from dar_fast import DARPipeline
from dar_fast.config import PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer

TINY_TOKENIZER = TokenizerConfig(
    image_size=16, patch_size=4, encoder_dim=32, encoder_depth=1, decoder_dim=32, decoder_depth=2,
    head_dim=16, codebook_size=64, num_tokens=16, num_groups=4, num_steps=4, query_table=16,
    dit=PixelDiTConfig(dim=32, depth=2, patch_size=4, head_dim=16),
)  # fmt: skip
TINY_PRIOR = PriorConfig(dim=32, depth=2, heads=2, vocab_size=64, num_tokens=16, num_classes=6)
TINY_LABELS = (
    "fluent/cat-face", "fluent/face-smiling", "noto/cat-face", "noto/face-smiling", "noto/hotel",
    "twemoji/cat-face",
)  # fmt: skip


def perturb(module: torch.nn.Module, seed: int, std: float = 0.15) -> None:
    """Add seeded noise to every parameter: zero heads and gates would hide what is behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))


def make_tiny_pipeline() -> DARPipeline:
    """A new pipeline of random weights, the same every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        prior, tokenizer = Prior(TINY_PRIOR), Tokenizer(TINY_TOKENIZER)
    perturb(prior, 1)
    perturb(tokenizer, 2)
    return DARPipeline(prior, tokenizer, TINY_LABELS)
