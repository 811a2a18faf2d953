"""Pages inside the Triton kernels: launch properties, codes to fp32 and back, and their variants.

float8_e4m3fn travels as bytes: sm_89 and later convert it, two values an instruction; before, and
under the interpreter, integer instructions do.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dar_kernels.pages import LARGEST_CODE
from dar_kernels.triton_support import INTERPRETED, cast, tl, triton


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def dependent_launch(device: torch.device) -> bool:
    """Whether a launch may begin before the one it waits for has drained: sm_90, compiled."""
    return not INTERPRETED and _capability(device) >= (9, 0)


def kernel_pages(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, str | None]:
    """Pages as a kernel takes them: float8 as bytes, with how to convert it."""
    if keys.dtype != torch.float8_e4m3fn:
        return keys, values, None
    native = not INTERPRETED and _capability(keys.device) >= (8, 9)
    return keys.view(torch.uint8), values.view(torch.uint8), "native" if native else "bits"


class PageVariant(NamedTuple):
    """What the page's dtype and the chip give to the ahead-of-time variant of a kernel."""

    architecture: int
    x: str  # Triton's name of the dtype of q
    dtype: torch.dtype  # of the pages
    signature: dict[str, str]
    constants: dict[str, Any]


def page_variants() -> Iterator[PageVariant]:
    """Every dtype of pages that a preset would use, on each architecture."""
    for x, name, dtype in (
        ("bf16", "bf16", torch.bfloat16),
        ("bf16", "i8", torch.int8),
        ("bf16", "u8", torch.float8_e4m3fn),
        ("fp16", "fp16", torch.float16),
        ("fp32", "fp32", torch.float32),
    ):
        for architecture in (80, 90):
            fp8 = "native" if architecture >= 89 else "bits"
            signature = dict.fromkeys(("keys_ptr", "values_ptr"), f"*{name}")
            constants: dict[str, Any] = {"PDL": architecture >= 90}
            constants["FP8"] = fp8 if dtype == torch.float8_e4m3fn else None
            for scales in ("key_scales_ptr", "value_scales_ptr"):
                if dtype in LARGEST_CODE:
                    signature[scales] = "*fp32"
                else:
                    constants[scales] = None
            yield PageVariant(architecture, x, dtype, signature, constants)


@triton.jit
def decode(x, FP8: tl.constexpr):
    """fp32 of a tile of pages; float8_e4m3fn comes as bytes, and sm_80 cannot convert it."""
    if FP8 == "bits":  # the fp16 with the same bits is 2^8 too small, among subnormals too
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    elif FP8 == "native":
        return x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return x.to(tl.float32)


@triton.jit
def encode(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """fp32 within the range of the pages to the nearest code, ties to even; see `decode`."""
    if FP8 == "bits":
        bits = x.to(tl.uint32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2^-6 codes are 2^-9 apart; adding 2^23 leaves the rounded integer in the low bits.
        small = size.to(tl.float32, bitcast=True) * 512.0 + 8388608.0
        small = small.to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(size < 0x3C800000, small, normal)
        return (code | (bits >> 24 & 0x80)).to(tl.uint8)
    elif FP8 == "native":
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif dtype == tl.int8:
        return ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 · 2^23: round to nearest even
    else:
        return cast(x, dtype)
