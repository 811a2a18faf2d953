"""The device that a caller names, or the one to take where nobody does."""

import torch


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; by default the GPU where there is one, else the CPU.

    Raises:
        TypeError, ValueError: where it is no device, or one that torch does not have here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device: expected a string or torch.device, got {type(device).__name__}")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one such as 'cpu' or 'cuda', got {device!r}") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one of this machine, got {device!r}: no GPU is at hand")
    return picked


__all__ = ["pick_device"]
