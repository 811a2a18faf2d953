"""The presets of dar_fast as sizes that kernels know."""

from dar_fast.config import PRIORS, TOKENIZERS
from dar_kernels.aot import DecoderShape, DenoiserShape, Shape


def shapes() -> dict[str, Shape]:
    """By name: "prior L", "tokenizer v1"."""
    priors = {
        f"prior {name}": DecoderShape(
            dim=prior.dim,
            heads=prior.heads,
            kv_heads=prior.key_value_heads,
            hidden_dim=prior.hidden_dim,
            vocab_size=prior.vocab_size,
        )
        for name, prior in PRIORS.items()
    }
    tokenizers = {
        f"tokenizer {name}": DenoiserShape(
            dim=tokenizer.dit.dim,
            head_dim=tokenizer.dit.head_dim,
            condition_tokens=tokenizer.group_size,
            patches=(tokenizer.image_size // tokenizer.dit.patch_size) ** 2,
            patch_size=tokenizer.dit.patch_size,
            codebook_size=tokenizer.codebook_size,
            code_dim=tokenizer.code_dim,
        )
        for name, tokenizer in TOKENIZERS.items()
    }
    return {**priors, **tokenizers}
