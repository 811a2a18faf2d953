"""What is timed: a model of a folder, or one of random weights, which serves for speed.

A random one is made in its dtype on its device: prior L and tokenizer v1 in bf16 take 1.3 GB.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch

from dar_fast.checkpoint.pipeline_folder import check_parts, load_parts, pick_device, pick_dtype
from dar_fast.config import PRIORS, TOKENIZERS
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


def _subject(name: str, prior: Prior, tokenizer: Tokenizer) -> Subject:
    check_parts(prior, tokenizer, None)
    plain = Plain(prior=prior.eval(), tokenizer=unpacked(tokenizer))
    pack(tokenizer.eval().pixel_dit)
    return Subject(name=name, prior=prior, tokenizer=tokenizer, plain=plain)


def _preset(option: str, name: str, presets: object) -> None:
    if not isinstance(presets, dict) or name not in presets:
        known = ", ".join(presets) if isinstance(presets, dict) else ""
        raise ValueError(f"{option}: expected one of {known}, got {name!r}")


def random_subject(
    prior: str, tokenizer: str, device: str | None = None, dtype: torch.dtype | None = None
) -> Subject:
    """Presets by name under random weights, bf16 by default.

    Raises:
        ValueError: where a name is no preset, the two do not fit, or the device is none.
    """
    _preset("prior", prior, PRIORS)
    _preset("tokenizer", tokenizer, TOKENIZERS)
    place = pick_device(device)
    number = pick_dtype(dtype or torch.bfloat16, place)
    return _subject(
        f"prior {prior}, tokenizer {tokenizer}, random weights",
        random_model(Prior, PRIORS[prior], number, place),
        random_model(Tokenizer, TOKENIZERS[tokenizer], number, place),
    )


def stored_subject(
    model: str, device: str | None = None, dtype: torch.dtype | None = None
) -> Subject:
    """The embedded model, "demo", or a folder's; the dtype as `from_pretrained` picks it.

    Raises:
        CheckpointError: where the folder cannot be read.
        TypeError, ValueError: where device or dtype is none.
    """
    place = pick_device(device)
    parts = load_parts(model, place, pick_dtype(dtype, place))
    return _subject(model, parts.prior, parts.tokenizer)


__all__ = [
    "DTYPES", "Plain", "Subject", "random_model", "random_subject", "randomise", "stored_subject",
    "unpacked",
]  # fmt: skip
