"""What ops say of an argument that does not fit: what was expected, and what came."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def check_tensor(
    op: str,
    name: str,
    value: object,
    shape: Mapping[str, int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raise unless `value` is a tensor of these sizes, one of these dtypes, on this device.

    `shape` names the dimensions in order; None: any size. Likewise the device.

    Raises:
        TypeError: where it is no tensor, or of another dtype.
        ValueError: where its shape or device differs.
    """
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{op}: expected {name} a tensor in {names}, got {got}")
    sizes = list(shape.values())
    if value.ndim != len(sizes) or any(
        s is not None and s != n for s, n in zip(sizes, value.shape, strict=True)
    ):
        wanted = ", ".join(d if s is None else f"{d} = {s}" for d, s in shape.items())
        raise ValueError(f"{op}: expected {name} [{wanted}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: expected {name} on {device}, got {value.device}")
