"""What a case of the kernels' bench is, the inputs it is made of, and the table of all cases.

Bytes and FLOPs are the least that the op's own formulation needs (its docstring); everything is
bf16 but where a name says otherwise. The cases are in cases_prior.py and cases_tokenizer.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dar_kernels as ops
from dar_kernels.aot import DecoderShape, Shape
from dar_kernels.pages import PAGE_SIZE, Pages
from dar_kernels.quantize import QuantizedWeight

TOKENS = 256  # codes of a picture
HALF = 2  # bytes of bf16
FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed.

    Args:
        shape: of the main tensor, for the reader.
        run: the op with the implementation of that name.
        implementations: the plain one, ours, and others to time beside them, each by its name.
        bytes, flops: of one call.
        backward: bytes and FLOPs of the backward pass; None: there is none to time.
        library: another way to the same result, by its name, where there is one worth comparing.
        precision: whose matrix ceiling the FLOPs are held to.
    """

    shape: str
    run: Callable[[str], Any]
    implementations: tuple[str, ...] = ("torch", "triton")
    bytes: int
    flops: int = 0
    backward: tuple[int, int] | None = None
    library: tuple[str, Callable[[], Any]] | None = None
    precision: torch.dtype = torch.bfloat16


@dataclass(slots=True)
class Make:
    """Random tensors on a device; with `grad` those of the default dtype are leaves."""

    device: str
    dtype: torch.dtype = torch.bfloat16
    grad: bool = False
    leaves: list[Tensor] = field(default_factory=list)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, device=self.device).to(dtype or self.dtype)
        if self.grad and dtype is None:
            self.leaves.append(x.requires_grad_())
        return x

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, device=self.device, dtype=dtype)

    def tables(self, N: int, head_dim: int) -> tuple[Tensor, Tensor]:
        angles = self(N, head_dim // 2, dtype=torch.float32)
        return angles.cos(), angles.sin()

    def byte_weight(self, O: int, D: int, dtype: torch.dtype) -> QuantizedWeight:  # noqa: E741
        values = self(O, D, dtype=torch.float32).mul(32).clamp(-127, 127).to(dtype)
        return QuantizedWeight(values, torch.full((O,), 1e-3, device=self.device))

    def pages(self, s: DecoderShape, rows: int, dtype: torch.dtype) -> tuple[Pages, Tensor]:
        """Room for TOKENS positions of each row, and the block table."""
        each = TOKENS // PAGE_SIZE
        shape = (rows * each, s.kv_heads, PAGE_SIZE, s.head_dim)
        keys, values = (self(*shape, dtype=torch.float32).to(dtype) for _ in range(2))
        scales = [torch.ones(shape[:3], device=self.device) for _ in range(2)]
        table = torch.arange(rows * each, device=self.device, dtype=torch.int32).view(rows, each)
        return Pages(keys, values, *(scales if dtype.itemsize == 1 else ())), table


Build = Callable[[Any, int, Make], Case]
CASES: dict[str, tuple[type[Shape], Build]] = {}


def case(shape: type[Shape], name: str | None = None, **bound: Any) -> Callable[[Build], Build]:
    """Register a builder for presets of that kind, under its own name or another."""

    def register(build: Build) -> Build:
        label = name or build.__name__
        CASES[label] = (shape, lambda s, B, make: build(s, B, make, **bound))
        return build

    return register


def rotation(B: int, N: int, H: int, Dh: int, make: Make) -> Case:
    x = make(B, N, H, Dh).transpose(1, 2)
    cos, sin = make.tables(N, Dh)
    moved = 2 * B * N * H * Dh * HALF + 2 * cos.numel() * FLOAT
    return Case(
        shape=f"[{B}, {H}, {N}, {Dh}]", bytes=moved, backward=(moved, 0),
        run=lambda i: ops.rope_2d(x, cos, sin, implementation=i),
    )  # fmt: skip


def attention(B: int, H: int, Hkv: int, N: int, Dh: int, prefix: int | None, make: Make) -> Case:
    """Every back end for CUDA, beside a dense mask and what runs where none is named."""
    q, k, v = make(B, H, N, Dh), make(B, Hkv, N, Dh), make(B, Hkv, N, Dh)
    seen = N if prefix is None else prefix  # keys of each of the first queries; then one more each
    scores = B * H * (seen * N + (N - seen) * (N - seen + 1) // 2)
    moved = 2 * B * N * (H + Hkv) * Dh * HALF
    flops = 4 * scores * Dh
    return Case(
        shape=f"[{B}, {H}, {N}, {Dh}]", bytes=moved, flops=flops,
        backward=(2 * moved, 5 * flops // 2),
        run=lambda i: ops.attention(q, k, v, prefix=prefix, implementation=i),
        implementations=("sdpa-masked", "sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient",
                         "flash-attn", "flash-attn-4", "xformers"),
    )  # fmt: skip
