"""A product that keeps its weight in one byte beside the one that it computes with.

The weight is scale[o]·values[o] in the dtype of the module: a prior that was stored or made in one
byte stays one plain module, and what decodes it reads the values and scales as they are, O·K + 4·O
bytes. See `dar_kernels.quantize`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dar_kernels.quantize import QuantizedWeight, dequantize


class Product(nn.Linear):
    """y = x Wᵀ with W `[O, K]`; see `quantized`."""

    _quantized: tuple[QuantizedWeight, Tensor, int] | None = None  # of which weight and version

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    @property
    def quantized(self) -> QuantizedWeight | None:
        """The values and scales that the weight stands for, on its device; None: it has none.

        Training, loading and any other change of the weight drop them; a move takes them along, and
        a cast changes only the weight.
        """
        if self._quantized is None:
            return None
        operand, weight, version = self._quantized
        if weight is not self.weight or version != _version(weight):
            self._quantized = None
            return None
        return operand

    def set_quantized(self, operand: QuantizedWeight) -> None:
        """Compute with what `operand` stands for, in the dtype and on the device of the weight."""
        weight = dequantize(operand, self.weight.dtype).to(self.weight.device)
        self.weight = nn.Parameter(weight, self.weight.requires_grad)
        self.keep_quantized(operand)

    def keep_quantized(self, operand: QuantizedWeight) -> None:
        """Keep `operand`, which the weight already stands for, on its device."""
        moved = QuantizedWeight(*(part.to(self.weight.device) for part in operand))
        self._quantized = moved, self.weight, _version(self.weight)

    def train(self, mode: bool = True) -> "Product":
        if mode:
            self._quantized = None
        return super().train(mode)

    def _apply(self, *args: Any, **options: Any) -> "Product":
        operand = self.quantized
        super()._apply(*args, **options)  # type: ignore[no-untyped-call]
        if operand is not None:
            self.keep_quantized(operand)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._quantized = None
        super()._load_from_state_dict(*args, **options)


def _version(weight: Tensor) -> int:
    """How often it was changed in place; those made for inference do not count it."""
    return 0 if torch.is_inference(weight) else weight._version


__all__ = ["Product"]
