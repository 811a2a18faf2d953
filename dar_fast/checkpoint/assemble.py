"""From a configuration and its tensors to a module: built without memory, loaded strictly."""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dar_fast.checkpoint.errors import CheckpointError
from dar_fast.checkpoint.quantized_state import (
    check_dtypes,
    dequantize_state,
    expected_state,
    keep_operands,
)
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_fast.quantization import Quantization

Kind = Literal["prior", "tokenizer"]
NAMED = 5  # names that an error lists


class Component(NamedTuple):
    """What a model is."""

    kind: Kind
    config: PriorConfig | TokenizerConfig
    quantization: Quantization | None = None  # in which a prior's products are stored


class _Undrawn(TorchFunctionMode):
    """Constructors without what they draw: the meta device has nothing to draw into.

    There torch would take 1.8 s the first time, for importing its compiler: 45 times the rest.
    """

    _DRAWING = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, F.normalize)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self._DRAWING:
            return args[0] if args else kwargs["tensor"]
        if func is torch.randn:
            func = torch.empty
        return func(*args, **kwargs)


def empty(component: Component, tensors: int) -> Prior | Tokenizer:
    """The module on the meta device.

    Raises:
        CheckpointError: where the configuration has more layers than there are `tensors`, or
            asks for impossible sizes.
    """
    config = component.config
    if isinstance(config, PriorConfig):
        depth = config.depth
    else:
        depth = config.encoder_depth + config.decoder_depth + config.dit.depth
    if depth > tensors:
        raise CheckpointError(f"expected weights of {depth} layers, got {tensors} tensors in all")
    try:
        with torch.device("meta"), _Undrawn():
            return Prior(config) if isinstance(config, PriorConfig) else Tokenizer(config)
    except (RuntimeError, OverflowError) as error:
        raise CheckpointError(f"impossible sizes in the configuration ({error})") from error


def names_of(names: set[str]) -> str:
    """The first few names, sorted, and how many more."""
    listed = sorted(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


def build(
    component: Component,
    tensors: dict[str, Tensor],
    where: str,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Prior | Tokenizer:
    """The module with these tensors for parameters, not copied where nothing changes.

    Quantised products become what their bytes stand for, and keep these.

    Args:
        where: what the errors call the source.

    Raises:
        CheckpointError: naming the missing, unexpected or mis-shaped tensors, or one of another
            dtype or with values that are not finite.
    """
    try:
        module = empty(component, len(tensors))
        expected = expected_state(module, component.quantization)
        check_names(set(expected), set(tensors))
        check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        check_dtypes(expected, {name: tensor.dtype for name, tensor in tensors.items()})
        operands = dequantize_state(module, tensors, component.quantization, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device=device or "cpu", dtype=dtype)
    module.load_state_dict(tensors, strict=True, assign=True)
    left = {name for name, buffer in module.named_buffers() if buffer.is_meta}
    assert not left, left  # a buffer that is not stored must be made at first use
    keep_operands(module, operands)
    return module.eval()


def check_names(expected: set[str], got: set[str]) -> None:
    """Raise CheckpointError unless the two sets of names are the same."""
    missing, unexpected = expected - got, got - expected
    parts = [
        f"{what} {len(names)}: {names_of(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if parts:
        raise CheckpointError(
            f"expected {len(expected)} tensors, got {len(got)}; {'; '.join(parts)}"
        )


def check_shapes(expected: dict[str, Tensor], got: dict[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError at the first tensor of another shape."""
    for name, shape in got.items():
        if tuple(expected[name].shape) != shape:
            raise CheckpointError(
                f"{name}: expected shape {list(expected[name].shape)}, got {list(shape)}"
            )


__all__ = ["Component", "Kind", "build", "check_names", "check_shapes", "empty", "names_of"]
