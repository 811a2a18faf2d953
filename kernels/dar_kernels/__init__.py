"""dar_kernels: the ops of dar_fast, one a file; they know nothing of models."""

from contextlib import AbstractContextManager

from dar_kernels.adaln_cross_attention import OP as _ADALN_CROSS_ATTENTION
from dar_kernels.adaln_cross_attention import absorb_output, adaln_cross_attention
from dar_kernels.adaln_modulate import OP as _ADALN_MODULATE
from dar_kernels.adaln_modulate import AdaLNModulate, adaln_modulate
from dar_kernels.attention import OP as _ATTENTION
from dar_kernels.attention import attention
from dar_kernels.decode_step import OP as _DECODE_STEP
from dar_kernels.dispatch import Choice, UnavailableError, require
from dar_kernels.dispatch import prefer as _prefer
from dar_kernels.dispatch import report as _report
from dar_kernels.dropout import OP as _DROPOUT
from dar_kernels.dropout import dropout
from dar_kernels.flow_step import OP as _FLOW_STEP
from dar_kernels.flow_step import flow_step
from dar_kernels.gate_residual_modulate import OP as _GATE_RESIDUAL_MODULATE
from dar_kernels.gate_residual_modulate import GateResidual, gate_residual_modulate
from dar_kernels.guided_sample import OP as _GUIDED_SAMPLE
from dar_kernels.guided_sample import guided_sample
from dar_kernels.layer_norm import OP as _LAYER_NORM
from dar_kernels.layer_norm import layer_norm
from dar_kernels.layer_norm_modulate import OP as _LAYER_NORM_MODULATE
from dar_kernels.layer_norm_modulate import layer_norm_modulate
from dar_kernels.linear import (
    Activation,
    Fp8Weight,
    PackedWeight,
    fp8_missing,
    fp8_weight,
    linear,
    pack_weight,
    packs,
    takes_fp8,
)
from dar_kernels.linear_cross_entropy import OP as _LINEAR_CROSS_ENTROPY
from dar_kernels.linear_cross_entropy import linear_cross_entropy
from dar_kernels.linear_decode import OP as _LINEAR_DECODE
from dar_kernels.linear_decode import linear_decode
from dar_kernels.linear_decode_swiglu import OP as _LINEAR_DECODE_SWIGLU
from dar_kernels.linear_decode_swiglu import linear_decode_swiglu
from dar_kernels.normed_attention import OP as _NORMED_ATTENTION
from dar_kernels.normed_attention import normed_attention
from dar_kernels.paged_attention import OP as _PAGED_ATTENTION
from dar_kernels.paged_attention import paged_attention
from dar_kernels.qkv_rope_append import OP as _QKV_ROPE_APPEND
from dar_kernels.qkv_rope_append import qkv_rope_append
from dar_kernels.rms_norm_residual import OP as _RMS_NORM_RESIDUAL
from dar_kernels.rms_norm_residual import NormedResidual, rms_norm_residual
from dar_kernels.rope_2d import OP as _ROPE_2D
from dar_kernels.rope_2d import rope_2d
from dar_kernels.swiglu import OP as _SWIGLU
from dar_kernels.swiglu import swiglu
from dar_kernels.vq_losses import OP as _VQ_LOSSES
from dar_kernels.vq_losses import VQLosses, vq_losses
from dar_kernels.vq_nearest import OP as _VQ_NEAREST
from dar_kernels.vq_nearest import vq_nearest

OPS = (
    _ADALN_CROSS_ATTENTION,
    _ADALN_MODULATE,
    _ATTENTION,
    _DECODE_STEP,
    _DROPOUT,
    _FLOW_STEP,
    _GATE_RESIDUAL_MODULATE,
    _GUIDED_SAMPLE,
    _LAYER_NORM,
    _LAYER_NORM_MODULATE,
    _LINEAR_CROSS_ENTROPY,
    _LINEAR_DECODE,
    _LINEAR_DECODE_SWIGLU,
    _NORMED_ATTENTION,
    _PAGED_ATTENTION,
    _QKV_ROPE_APPEND,
    _RMS_NORM_RESIDUAL,
    _ROPE_2D,
    _SWIGLU,
    _VQ_LOSSES,
    _VQ_NEAREST,
)


def prefer(implementation: str, op: str | None = None) -> AbstractContextManager[None]:
    """Within it, an implementation by name: a wish to every op, or an order to one.

    Without `op`: every op that can run `torch`, `native` or `triton` does, the others choose as
    ever. With it (`prefer("flash-attn", op="attention")`): every call of that op runs the named
    implementation, or raises UnavailableError and says why. `implementation=` of a call comes
    first; a compiled graph keeps what held while it was traced.

    Raises:
        ValueError: where there is no such op, or no such implementation.
        UnavailableError: where it is not installed.
    """
    if op is None:
        return _prefer(implementation)
    for known in OPS:
        if known.name == op:
            return require(known, implementation)
    raise ValueError(f"op: expected one of {', '.join(o.name for o in OPS)}, got {op!r}")


def report(devices: tuple[str, ...] = ("cpu", "cuda")) -> dict[str, dict[str, Choice]]:
    """For each op and device type, what runs fp32 input, and why the others do not."""
    return _report(OPS, devices)


__all__ = [
    "OPS",
    "Activation",
    "AdaLNModulate",
    "Choice",
    "Fp8Weight",
    "GateResidual",
    "NormedResidual",
    "PackedWeight",
    "UnavailableError",
    "VQLosses",
    "absorb_output",
    "adaln_cross_attention",
    "adaln_modulate",
    "attention",
    "dropout",
    "flow_step",
    "fp8_missing",
    "fp8_weight",
    "gate_residual_modulate",
    "guided_sample",
    "layer_norm",
    "layer_norm_modulate",
    "linear",
    "linear_cross_entropy",
    "linear_decode",
    "linear_decode_swiglu",
    "normed_attention",
    "pack_weight",
    "packs",
    "paged_attention",
    "prefer",
    "qkv_rope_append",
    "report",
    "rms_norm_residual",
    "rope_2d",
    "swiglu",
    "takes_fp8",
    "vq_losses",
    "vq_nearest",
]
