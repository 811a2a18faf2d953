"""Triton where it is installed, and what every kernel here shares.

Without Triton the package imports and runs on PyTorch and C++: the stand-ins below are never
launched, because `missing` is what the dispatcher asks first. With TRITON_INTERPRET=1 in the
environment before the import, kernels run on the CPU, one program after another: for tests.
"""

import functools
import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:

    class _Absent:
        """Takes any attribute, call or decoration, so that a module of kernels can be read."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    triton = tl = _Absent()
    INSTALLED = False
else:
    INSTALLED = True

INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)  # whose bf16 products are garbage, and casts to it cut off
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def missing() -> str | None:
    """Why Triton kernels cannot run here and how to get them to; None where they can."""
    if not INSTALLED:
        return "Triton is not installed: pip install triton (Linux)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 in the environment runs it on the CPU)"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"expected compute capability 8.0 or later, got {major}.{minor}"
    return None


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32 on the matrix units; fp32 operands in full precision, no TF32."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 or a small integer to `dtype`, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


def launch_options(*, num_warps: int, num_stages: int = 2, **more: Any) -> dict[str, Any]:
    """Options of a launch and of its ahead-of-time variant: the same, so both compile the same."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **more}


def contiguous_last(x: Tensor) -> Tensor:
    """`x`, or a copy of it where its last dimension is not contiguous."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


__all__ = [
    "INSTALLED", "INTERPRETED", "TRITON_DTYPES", "cast", "contiguous_last", "dot",
    "launch_options", "missing", "tl", "triton",
]  # fmt: skip
