"""A Llama decoder as tensors, and the pages of keys and values of all its layers.

Products are in the dtype of the norms, or one byte a weight with a scale a channel (quantize.py).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.checks import check_tensor
from dar_kernels.pages import Pages, new_pages
from dar_kernels.quantize import QuantizedWeight, quantize_weight

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
Weight = Tensor | QuantizedWeight


class LayerWeights(NamedTuple):
    """Of one layer; norms `[D]`, products `[O, K]` as nn.Linear holds them, or quantised."""

    attention_norm: Tensor  # [D]
    qkv: Weight  # [(H + 2 Hkv) Dh, D]: q, k, v stacked
    proj: Weight  # [D, H Dh]
    mlp_norm: Tensor  # [D]
    gate: Weight  # [F, D]
    up: Weight  # [F, D]
    down: Weight  # [D, F]

    def products(self) -> tuple[Weight, ...]:
        """qkv, proj, gate, up, down."""
        return self.qkv, self.proj, self.gate, self.up, self.down

    def map_products(self, fn: Callable[[Weight], Weight]) -> "LayerWeights":
        """The five of `products` through `fn`."""
        qkv, proj, gate, up, down = map(fn, self.products())
        return self._replace(qkv=qkv, proj=proj, gate=gate, up=up, down=down)


class DecoderWeights(NamedTuple):
    """Of a decoder; cos and sin are fp32 `[N, Dh / 2]`, one row a position."""

    layers: Sequence[LayerWeights]
    norm: Tensor  # [D]
    head: Weight  # [V, D]
    token_embedding: Tensor  # [V, D]
    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return 2 * self.cos.shape[1]

    @property
    def quantized(self) -> torch.dtype | None:
        """What products and head are stored in, int8 or float8_e4m3fn; None where as the norms.

        Raises:
            TypeError: where some are quantised and others not, or otherwise.
        """
        products = chain(*(layer.products() for layer in self.layers), (self.head,))
        kinds = {w.values.dtype if isinstance(w, QuantizedWeight) else None for w in products}
        if len(kinds) > 1:
            names = sorted(str(kind or "as given") for kind in kinds)
            raise TypeError(f"weights: expected products and head stored alike, got {names}")
        return kinds.pop()

    def map(self, fn: Callable[[Tensor], Tensor]) -> "DecoderWeights":
        """Every tensor through `fn`, values and scales of quantised ones too."""

        def each(weight: Weight) -> Weight:
            if isinstance(weight, QuantizedWeight):
                return QuantizedWeight(fn(weight.values), fn(weight.scale))
            return fn(weight)

        def of_layer(layer: LayerWeights) -> LayerWeights:
            norms = {"attention_norm": fn(layer.attention_norm), "mlp_norm": fn(layer.mlp_norm)}
            return layer.map_products(each)._replace(**norms)

        return self._replace(
            layers=[of_layer(layer) for layer in self.layers],
            norm=fn(self.norm),
            head=each(self.head),
            token_embedding=fn(self.token_embedding),
            cos=fn(self.cos),
            sin=fn(self.sin),
        )

    def quantize(self, dtype: torch.dtype) -> "DecoderWeights":
        """Products and head in one byte a weight; norms, embedding and tables stay as they are.

        Weights that are in `dtype` already are returned uncopied.

        Args:
            dtype: torch.int8 or torch.float8_e4m3fn.

        Raises:
            TypeError: where `dtype` is neither, or the weights are quantised in the other.
            ValueError: where a weight is not finite.
        """

        def each(weight: Weight) -> Weight:
            if isinstance(weight, Tensor):
                return quantize_weight(weight, dtype)
            if weight.values.dtype != dtype:
                raise TypeError(
                    f"quantize: expected dtype {weight.values.dtype}, which the weights are in "
                    f"already, got {dtype}"
                )
            return weight

        layers = [layer.map_products(each) for layer in self.layers]
        return self._replace(layers=layers, head=each(self.head))


class DecoderPages(NamedTuple):
    """Keys and values of all layers, each `[layers, num_pages, Hkv, 32, Dh]`.

    int8 and float8_e4m3fn pages have scales fp32 `[layers, num_pages, Hkv, 32]`; others None.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def by_layer(self) -> Iterator[Pages]:
        """The pages of each layer."""
        scales = (repeat(None) if s is None else s for s in (self.key_scales, self.value_scales))
        return map(Pages, self.keys, self.values, *scales)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Page b becomes what page a is, for each (a, b), in all layers; a few launches in all.

        Every a is read before any b is written. Not for a captured graph: the pairs are uploaded.

        Raises:
            TypeError: where a page is no integer.
            ValueError: where a page does not exist, or is the target of two pairs.
        """
        count = self.keys.shape[1]
        for page in chain(*pairs):
            if isinstance(page, bool) or not isinstance(page, int):
                raise TypeError(f"copy: expected pages as integers, got {page!r}")
            if not 0 <= page < count:
                raise ValueError(f"copy: expected pages in [0, {count}), got {page}")
        targets = [to for _, to in pairs]
        if len(set(targets)) < len(targets):
            twice = next(page for page in targets if targets.count(page) > 1)
            raise ValueError(f"copy: expected different targets, got page {twice} twice")
        if not pairs:
            return
        numbers = torch.tensor(list(pairs))
        if self.keys.is_cuda:
            numbers = numbers.pin_memory()  # so that the upload waits for nothing
        source, target = numbers.to(self.keys.device, non_blocking=True).unbind(1)
        for part in self:
            if part is not None:
                # indexing knows no float8
                bits = part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part
                bits.index_copy_(1, target, bits.index_select(1, source))


def new_decoder_pages(weights: DecoderWeights, num_pages: int, dtype: torch.dtype) -> DecoderPages:
    """Pages of zeros on the device of the weights.

    Raises:
        TypeError: where pages cannot have that dtype (`dar_kernels.pages.PAGE_DTYPES`).
    """
    layers = len(weights.layers)
    flat = new_pages(
        layers * num_pages, weights.kv_heads, weights.head_dim, dtype=dtype,
        device=weights.norm.device,
    )  # fmt: skip
    return DecoderPages(*(p.unflatten(0, (layers, num_pages)) for p in flat if p is not None))


def readable(tensor: Tensor) -> Tensor:
    """What C++ can read: contiguous, fp16 as fp32, without a graph.

    Raises:
        TypeError: where it is no tensor of a dtype that weights can have.
        ValueError: where it is not on the CPU.
    """
    check_tensor("decode_step", "weights", tensor, (...,), (*WEIGHT_DTYPES, torch.int8), CPU)
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def check_on_cpu(tensors: dict[str, Tensor], pages: DecoderPages) -> None:
    """Raise unless all are tensors on the CPU, `positions` has one dimension, pages no scales."""
    if not isinstance(pages, DecoderPages):
        raise TypeError(f"decode_step: expected pages a DecoderPages, got {type(pages).__name__}")
    if pages.key_scales is not None or pages.value_scales is not None:
        raise TypeError(
            f"decode_step: expected pages in float32 or bfloat16 for the native decoder, "
            f"got {pages.keys.dtype} with scales"
        )
    for name, tensor in (tensors | {"keys": pages.keys, "values": pages.values}).items():
        shape = ("B",) if name == "positions" else (...,)  # else the C++ compares shapes
        check_tensor("decode_step", name, tensor, shape, None, CPU)
