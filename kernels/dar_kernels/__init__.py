"""dar_kernels: the ops of dar_fast, one a file; they know nothing of models."""

from dar_kernels.dispatch import Choice, UnavailableError, prefer
from dar_kernels.dispatch import report as _report
from dar_kernels.vq_nearest import OP as _VQ_NEAREST
from dar_kernels.vq_nearest import vq_nearest

OPS = (_VQ_NEAREST,)


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> dict[str, dict[str, Choice]]:
    """For each op and device type, what runs fp32 input, and why the others do not."""
    return _report(OPS, devices)


__all__ = ["OPS", "Choice", "UnavailableError", "prefer", "report", "vq_nearest"]
