"""A prior with its products in one byte: int8 or fp8 (e4m3), one fp32 scale an output channel.

W[o] ≈ scale[o]·values[o] for qkv, proj, gate, up, down of every layer and the head; embeddings and
norms stay. A step of decoding then reads half the bytes of bf16. See `dar_kernels.quantize`.
"""

from typing import Literal, get_args

import torch

from dar_fast.models import Prior
from dar_fast.models.decoding import decoder_weights
from dar_fast.models.quantized import Product
from dar_kernels.decoder_weights import DecoderWeights
from dar_kernels.dispatch import UnavailableError
from dar_kernels.quantize import QuantizedWeight, quantize_weight

Quantization = Literal["int8", "fp8"]
WeightForm = Literal["as given", "int8", "fp8"]
DTYPES: dict[Quantization, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FORMS: tuple[WeightForm, ...] = get_args(WeightForm)
ONE_BYTE: dict[str, tuple[Quantization, ...]] = {"cpu": ("int8",)}  # of which decoding has kernels


def quantization_dtype(quantization: object) -> torch.dtype:
    """The dtype of "int8" or "fp8".

    Raises:
        ValueError: where it is neither.
    """
    if not isinstance(quantization, str) or quantization not in DTYPES:
        raise ValueError(f"quantization: expected one of {list(DTYPES)}, got {quantization!r}")
    return DTYPES[quantization]


def products(prior: Prior) -> dict[str, Product]:
    """What quantisation applies to, by name: `layers.0.attention.qkv`, …, `head`."""
    return {name: part for name, part in prior.named_modules() if isinstance(part, Product)}


def stored_quantization(prior: Prior) -> Quantization | None:
    """In which form all products of `prior` keep their weights beside it; None: in none.

    It is what `quantize_prior` made or a folder held, unless weights were changed since.
    """
    kept = [product.quantized for product in products(prior).values()]
    for name, dtype in DTYPES.items():
        if all(operand is not None and operand.values.dtype == dtype for operand in kept):
            return name
    return None


def quantize_prior(prior: Prior, quantization: Quantization) -> None:
    """Make the products of `prior` what they are in one byte, in place; each is read once.

    The plain module computes with the values that the bytes stand for, in its own dtype, and the
    bytes stay at hand for decoding and for `save_model`. Nothing changes where it is so already.

    Args:
        prior: in evaluation mode: training changes weights, which drops the bytes.
        quantization: "int8" or "fp8".

    Raises:
        ValueError: where `quantization` is neither, `prior` is in the other or in training mode, or
            a weight is not finite.
    """
    dtype = quantization_dtype(quantization)
    if _checked_kept(prior, "quantization", quantization):
        return
    if prior.training:
        raise ValueError("prior: expected evaluation mode, got training mode")
    parts = products(prior).values()
    operands = [quantize_weight(product.weight, dtype) for product in parts]
    for product, operand in zip(parts, operands, strict=True):  # all are finite: none is left out
        product.set_quantized(operand)


def _checked_kept(prior: Prior, name: str, quantization: Quantization) -> bool:
    """Whether the prior is in this form; an error where it is in the other."""
    kept = stored_quantization(prior)
    if kept not in (None, quantization):
        raise ValueError(
            f"{name}: expected {kept!r}, which the prior's weights are in, got "
            f"{quantization!r}: start from the weights before they were quantised"
        )
    return kept is not None


def check_weight_form(form: object, device: torch.device) -> None:
    """Raise unless weights in this form can be decoded with on this device.

    Raises:
        ValueError: where `form` is no WeightForm.
        UnavailableError: where the device has no kernels for it; it names what it has.
    """
    if not isinstance(form, str) or form not in FORMS:
        raise ValueError(f"prior_weights: expected one of {list(FORMS)}, got {form!r}")
    can = ["as given", *ONE_BYTE.get(device.type, DTYPES)]
    if form not in can:
        raise UnavailableError(
            f"prior_weights: expected one of {can} on {device.type}, got {form!r}, "
            "whose products are for CUDA devices"
        )


def stored_form(prior: Prior) -> WeightForm:
    """The one-byte form that the prior keeps, where its device decodes from it; else "as given"."""
    kept = stored_quantization(prior)
    can = ONE_BYTE.get(prior.device.type, tuple(DTYPES))
    return kept if kept is not None and kept in can else "as given"


def engine_weights(prior: Prior, form: WeightForm = "as given") -> DecoderWeights:
    """The weights of `prior` as decoding reads them, on its device.

    Args:
        prior: the plain module.
        form: "as given": the module's own tensors, uncopied, also where they stand for bytes.
            "int8", "fp8": the products in one byte; those that a folder held or `quantize_prior`
            made as they are, else quantised now, one pass over the weights.

    Raises:
        ValueError: where `form` is unknown, the prior is in the other one-byte form, or a weight is
            not finite.
        UnavailableError: where the device has no kernels for it.
    """
    check_weight_form(form, prior.device)
    weights = decoder_weights(prior)
    if form == "as given":
        return weights
    _checked_kept(prior, "prior_weights", form)
    dtype = DTYPES[form]

    def one_byte(product: Product) -> QuantizedWeight:
        kept = product.quantized
        if kept is not None and kept.values.dtype == dtype:
            return kept
        return quantize_weight(product.weight, dtype)

    layers = [
        layer._replace(
            qkv=one_byte(block.attention.qkv), proj=one_byte(block.attention.proj),
            gate=one_byte(block.mlp.gate), up=one_byte(block.mlp.up), down=one_byte(block.mlp.down),
        )
        for layer, block in zip(weights.layers, prior.blocks(), strict=True)
    ]  # fmt: skip
    return weights._replace(layers=layers, head=one_byte(prior.head))


__all__ = [
    "DTYPES", "Quantization", "WeightForm", "check_weight_form", "engine_weights", "products",
    "quantization_dtype", "quantize_prior", "stored_quantization",
]  # fmt: skip
