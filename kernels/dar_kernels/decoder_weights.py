"""A Llama decoder as tensors, and the pages of keys and values of all its layers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.checks import check_tensor
from dar_kernels.pages import PAGE_SIZE

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


class LayerWeights(NamedTuple):
    """Of one layer; norms `[D]`, products `[O, K]` as nn.Linear holds them."""

    attention_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2 Hkv) Dh, D]: q, k, v stacked
    proj: Tensor  # [D, H Dh]
    mlp_norm: Tensor  # [D]
    gate: Tensor  # [F, D]
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]

    def products(self) -> tuple[Tensor, ...]:
        """qkv, proj, gate, up, down."""
        return self.qkv, self.proj, self.gate, self.up, self.down


class DecoderWeights(NamedTuple):
    """Of a decoder; cos and sin are fp32 `[N, Dh / 2]`, one row a position."""

    layers: Sequence[LayerWeights]
    norm: Tensor  # [D]
    head: Tensor  # [V, D]
    token_embedding: Tensor  # [V, D]
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return 2 * self.cos.shape[1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> "DecoderWeights":
        """Every tensor through `fn`."""
        return self._replace(
            layers=[LayerWeights(*map(fn, layer)) for layer in self.layers],
            norm=fn(self.norm),
            head=fn(self.head),
            token_embedding=fn(self.token_embedding),
            cos=fn(self.cos),
            sin=fn(self.sin),
        )


class DecoderPages(NamedTuple):
    """Keys and values of all layers, each `[layers, num_pages, Hkv, 32, Dh]`, fp32 or bf16."""

    keys: Tensor
    values: Tensor


def new_decoder_pages(weights: DecoderWeights, num_pages: int, dtype: torch.dtype) -> DecoderPages:
    """Pages of zeros on the device of the weights."""
    shape = (len(weights.layers), num_pages, weights.kv_heads, PAGE_SIZE, weights.head_dim)
    keys = torch.zeros(shape, dtype=dtype, device=weights.norm.device)
    return DecoderPages(keys, torch.zeros_like(keys))


def readable(tensor: Tensor) -> Tensor:
    """What C++ can read: contiguous, fp16 as fp32, without a graph.

    Raises:
        TypeError: where it is no tensor of a dtype that weights can have.
        ValueError: where it is not on the CPU.
    """
    check_tensor("decode_step", "weights", tensor, (...,), WEIGHT_DTYPES, CPU)
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def check_on_cpu(tensors: dict[str, Tensor], pages: DecoderPages) -> None:
    """Raise unless all are tensors on the CPU and `positions` has one dimension."""
    if not isinstance(pages, DecoderPages):
        raise TypeError(f"decode_step: expected pages a DecoderPages, got {type(pages).__name__}")
    for name, tensor in (tensors | pages._asdict()).items():
        shape = ("B",) if name == "positions" else (...,)  # else the C++ compares shapes
        check_tensor("decode_step", name, tensor, shape, None, CPU)
