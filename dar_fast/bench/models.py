"""What is timed: a model of a folder, or one of random weights, which serves for speed.

A random one is made in its dtype on its device: prior L and tokenizer v1 in bf16 take 1.3 GB.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from dar_fast.checkpoint import CheckpointError
from dar_fast.checkpoint.folder import read_config
from dar_fast.checkpoint.pipeline_folder import (
    DEMO,
    check_parts,
    load_parts,
    pick_dtype,
)
from dar_fast.config import PRIORS, TOKENIZERS, PriorConfig, TokenizerConfig
from dar_fast.device import pick_device
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.layers import pack

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STD = 0.02

M = TypeVar("M", Prior, Tokenizer)


def randomise(model: torch.nn.Module) -> None:
    """No weight stays zero: a zero head would draw one code for ever."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.count_nonzero():
                p.normal_(std=STD)


def random_model(kind: type[M], config: object, dtype: torch.dtype, device: torch.device) -> M:
    """A `Prior` or `Tokenizer` of seeded random weights, in evaluation mode."""
    with torch.device("meta"):
        model: M = kind(config)  # type: ignore[arg-type]
    model = model.to(dtype).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 and name.endswith("weight"):
                p.fill_(1)  # of a norm
            else:
                p.normal_(std=STD, generator=generator)
    return model


def unpacked(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer over the same weights, of which no copy is packed."""
    with torch.device("meta"):
        plain = Tokenizer(tokenizer.config)
    plain.load_state_dict(tokenizer.state_dict(), assign=True)
    return plain.eval()


@dataclass(slots=True, kw_only=True)
class Plain:
    """The parts of the plain path, as `draw_frames` takes them."""

    prior: Prior
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to time."""

    name: str
    prior: Prior
    tokenizer: Tokenizer  # its pixel DiT packed where that pays
    plain: Plain  # the same weights

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def weights(self) -> str:
        """The name of the prior's dtype: "fp32", "bf16"."""
        dtype = self.prior.head.weight.dtype
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, "fp16")

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a key's element."""
        return 4 if self.weights == "fp32" else 2

    def labels(self, count: int) -> list[int]:
        """So many classes, apart from each other."""
        classes = self.prior.config.num_classes
        return [i * 7 % classes for i in range(count)]


def make_subject(name: str, prior: Prior, tokenizer: Tokenizer) -> Subject:
    """A model to time: its pixel DiT packed where that pays, and a plain copy that is not.

    Raises:
        ValueError: where the two do not fit.
    """
    check_parts(prior, tokenizer, None)
    plain = Plain(prior=prior.eval(), tokenizer=unpacked(tokenizer))
    pack(tokenizer.eval().pixel_dit)
    return Subject(name=name, prior=prior, tokenizer=tokenizer, plain=plain)


def _preset(option: str, name: str, presets: Collection[str]) -> None:
    if name not in presets:
        raise ValueError(f"{option}: expected one of {', '.join(presets)}, got {name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """Which model: a stored one by name, or presets under random weights; made in any process.

    Args:
        model: "demo" or a folder, where the presets are None.
        prior, tokenizer: names of presets.
        device: None: the GPU where there is one.
        dtype: None: bf16 of presets, what `from_pretrained` picks of a stored one.
    """

    model: str = "demo"
    prior: str | None = None
    tokenizer: str | None = None
    device: str | None = None
    dtype: torch.dtype | None = None

    @property
    def presets(self) -> tuple[str, str] | None:
        """Prior and tokenizer, where the weights are random."""
        if self.prior is None or self.tokenizer is None:
            return None
        return self.prior, self.tokenizer

    @property
    def place(self) -> torch.device:
        """Where it runs."""
        return pick_device(self.device)

    @property
    def number(self) -> torch.dtype:
        """Of its weights."""
        return pick_dtype(self.dtype or (torch.bfloat16 if self.presets else None), self.place)

    @property
    def name(self) -> str:
        if self.presets is None:
            return self.model
        return f"prior {self.prior}, tokenizer {self.tokenizer}, random weights"

    def configs(self) -> tuple[PriorConfig, TokenizerConfig]:
        """Sizes, without the weights.

        Raises:
            ValueError: where a name is no preset, or the two do not fit.
            CheckpointError: where the folder cannot be read.
        """
        prior, tokenizer = self.presets or (DEMO, DEMO)
        if self.presets is None and self.model != DEMO:
            folder = Path(self.model)
            configs = tuple(read_config(folder / part).config for part in ("prior", "tokenizer"))
        else:
            _preset("prior", prior, PRIORS)
            _preset("tokenizer", tokenizer, TOKENIZERS)
            configs = PRIORS[prior], TOKENIZERS[tokenizer]
        if not isinstance(configs[0], PriorConfig) or not isinstance(configs[1], TokenizerConfig):
            raise CheckpointError(f"{self.model}: expected a prior and a tokenizer, got others")
        drawn = configs[0].num_tokens, configs[0].vocab_size
        read = configs[1].num_tokens, configs[1].codebook_size
        if drawn != read:  # before gigabytes of weights are made for two that do not fit
            raise ValueError(
                f"prior: expected the tokenizer's {read[0]} tokens of {read[1]} codes, "
                f"got {drawn[0]} of {drawn[1]}"
            )
        return configs[0], configs[1]

    def load(self) -> Subject:
        """The model itself.

        Raises:
            ValueError: where a name is no preset, the two do not fit, or the device is none.
            CheckpointError: where the folder cannot be read.
        """
        if self.presets is None:
            parts = load_parts(self.model, self.place, self.number)
            return make_subject(self.name, parts.prior, parts.tokenizer)
        prior, tokenizer = self.configs()
        return make_subject(
            self.name,
            random_model(Prior, prior, self.number, self.place),
            random_model(Tokenizer, tokenizer, self.number, self.place),
        )


__all__ = [
    "DTYPES", "Plain", "Spec", "Subject", "make_subject", "random_model", "randomise", "unpacked",
]  # fmt: skip
