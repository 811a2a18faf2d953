"""What a model is: frozen configurations and the presets of the paper.

A prior costs its weights, read once a token; a tokenizer its pixel DiT, S passes a picture.
Source: arXiv 2505.23660, §4 and the released checkpoints.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Self

SWIGLU_MULTIPLE = 256  # hidden widths are rounded up to whole tiles


def _check(owner: object, **bounds: int) -> None:
    for name, low in bounds.items():
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(
                f"{type(owner).__name__}: expected integer {name} >= {low}, got {value!r}"
            )


def _from_dict(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{cls.__name__}: expected keys among {sorted(known)}, got {unknown}")
    return dict(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorConfig:
    """A Llama over codes: class at position 0, code i at position i + 1.

    Raises:
        ValueError: where a size is not positive or the heads do not divide the width.
    """

    dim: int
    depth: int
    heads: int
    kv_heads: int | None = None  # None: one a query head
    vocab_size: int = 16_384
    num_tokens: int = 256
    num_classes: int = 1000
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        _check(self, dim=2, depth=1, heads=1, vocab_size=2, num_tokens=1, num_classes=1)
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(
                f"PriorConfig: expected dim divisible into {self.heads} heads of even width, "
                f"got {self.dim}"
            )
        if not (0 < self.norm_eps < 1 and 1 < self.rope_base < 1e9):
            raise ValueError(
                f"PriorConfig: expected norm_eps in (0, 1) and rope_base in (1, 1e9), "
                f"got {self.norm_eps!r} and {self.rope_base!r}"
            )
        if self.kv_heads is not None:
            _check(self, kv_heads=1)
            if self.heads % self.kv_heads:
                raise ValueError(
                    f"PriorConfig: expected kv_heads dividing {self.heads}, got {self.kv_heads}"
                )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden_dim(self) -> int:
        """SwiGLU width: two thirds of 4 D, rounded up to a multiple of 256."""
        return -(-(2 * 4 * self.dim // 3) // SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE

    @property
    def null_class(self) -> int:
        """The label of the unconditional row of guidance."""
        return self.num_classes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        return cls(**_from_dict(cls, values))


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelDiTConfig:
    """The diffusion decoder: a DiT over pixel patches, under one group of tokens a step."""

    dim: int = 768
    depth: int = 12
    patch_size: int = 8
    head_dim: int = 64
    data_std: float = 0.6  # x_1 = data_std * image
    time_shift: float = 2.0  # beta of the schedule
    repa_layer: int | None = None  # block before which the alignment head reads; None: no head

    def __post_init__(self) -> None:
        _check(self, dim=2, depth=1, patch_size=1, head_dim=4)
        if self.dim % self.head_dim or self.head_dim % 4:
            raise ValueError(
                f"PixelDiTConfig: expected dim divisible by a head_dim that is a multiple of 4, "
                f"got dim {self.dim}, head_dim {self.head_dim}"
            )
        if self.repa_layer is not None and not 0 <= self.repa_layer < self.depth:
            raise ValueError(
                f"PixelDiTConfig: expected repa_layer in [0, {self.depth}), got {self.repa_layer}"
            )
        if not (self.data_std > 0 and self.time_shift > 0):
            raise ValueError(
                f"PixelDiTConfig: expected data_std and time_shift > 0, "
                f"got {self.data_std}, {self.time_shift}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """The sequential diffusion tokenizer: encoder, quantizer, token decoder, pixel DiT.

    Raises:
        ValueError: where the patches do not tile the image or the groups do not divide the tokens.
    """

    image_size: int = 256
    patch_size: int = 16
    encoder_dim: int = 768
    encoder_depth: int = 8
    decoder_dim: int = 768
    decoder_depth: int = 8
    head_dim: int = 64
    code_dim: int = 8
    codebook_size: int = 16_384
    num_tokens: int = 256
    num_groups: int = 8
    num_steps: int = 8
    query_table: int = 1024  # rows of the query and decoder embeddings; the first N are used
    dit: PixelDiTConfig = PixelDiTConfig()

    def __post_init__(self) -> None:
        _check(
            self, image_size=1, patch_size=1, encoder_dim=2, encoder_depth=1, decoder_dim=2,
            decoder_depth=1, head_dim=4, code_dim=1, codebook_size=2, num_tokens=1, num_groups=1,
            num_steps=1, query_table=1,
        )  # fmt: skip
        for name, patch in (
            ("patch_size", self.patch_size),
            ("dit.patch_size", self.dit.patch_size),
        ):
            if self.image_size % patch:
                raise ValueError(
                    f"TokenizerConfig: expected {name} dividing image_size {self.image_size}, "
                    f"got {patch}"
                )
        if self.num_tokens % self.num_groups:
            raise ValueError(
                f"TokenizerConfig: expected num_groups dividing num_tokens {self.num_tokens}, "
                f"got {self.num_groups}"
            )
        if self.num_tokens > self.query_table:
            raise ValueError(
                f"TokenizerConfig: expected num_tokens <= {self.query_table}, got {self.num_tokens}"
            )
        for name in ("encoder_dim", "decoder_dim"):
            if getattr(self, name) % self.head_dim or self.head_dim % 4:
                raise ValueError(
                    f"TokenizerConfig: expected {name} divisible by a head_dim that is a multiple "
                    f"of 4, got {getattr(self, name)} and {self.head_dim}"
                )

    @property
    def group_size(self) -> int:
        """Q, tokens a group."""
        return self.num_tokens // self.num_groups

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        values = _from_dict(cls, values)
        if isinstance(values.get("dit"), dict):
            values["dit"] = PixelDiTConfig(**_from_dict(PixelDiTConfig, values["dit"]))
        return cls(**values)


PRIORS = {
    "B": PriorConfig(dim=768, depth=12, heads=12),
    "L": PriorConfig(dim=1024, depth=24, heads=16),
    "XL": PriorConfig(dim=1280, depth=36, heads=20),
    "XXL": PriorConfig(dim=1536, depth=48, heads=24),
    "XXXL": PriorConfig(dim=2560, depth=48, heads=40),
    "1B": PriorConfig(dim=2048, depth=22, heads=32),
    "3B": PriorConfig(dim=3200, depth=24, heads=32),
    "7B": PriorConfig(dim=4096, depth=32, heads=32),
    # num_classes is the emoji data set's: style x subgroup (dar_train.emoji)
    "demo": PriorConfig(dim=256, depth=5, heads=4, vocab_size=4096, num_tokens=64, num_classes=391),
}

TOKENIZERS = {
    "v1": TokenizerConfig(dit=PixelDiTConfig(repa_layer=8)),
    "lite": TokenizerConfig(
        encoder_dim=512, decoder_dim=512, dit=PixelDiTConfig(dim=512, depth=8, repa_layer=5)
    ),
    "demo": TokenizerConfig(
        image_size=32, patch_size=4, encoder_dim=192, encoder_depth=4, decoder_dim=192,
        decoder_depth=3, codebook_size=4096, num_tokens=64, query_table=64,
        dit=PixelDiTConfig(dim=192, depth=6, patch_size=4),
    ),
}  # fmt: skip


__all__ = ["PRIORS", "TOKENIZERS", "PixelDiTConfig", "PriorConfig", "TokenizerConfig"]
