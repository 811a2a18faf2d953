"""C++ on the CPU for the LayerNorm fusions of the pixel DiT, kernels/csrc/modulate.h: no gradients.

Each is one pass over rows that stay in the first-level cache; fp32 and bf16, sums in fp32.
"""

import torch
from torch import Tensor

from dar_kernels.layer_norm_rows import EPS
from dar_kernels.linear import PackedWeight, linear
from dar_kernels.triton_support import contiguous_last

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def blocked(device: str) -> bool:
    """Whether a graph is being traced or autocast is on: the C++ takes tensors as they are."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(device)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else contiguous_last(x.detach())


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None, *, isa: str = "") -> Tensor:
    """LN(x)(1 + scale) + shift, or LN(x) without both; `[B, N, D]`."""
    from dar_kernels import _native

    out = torch.empty(x.shape, dtype=x.dtype)
    _native.modulate(
        _rows(x), None, None, _rows(shift), _rows(scale), None, out, EPS,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return out


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor | None, scale: Tensor | None, *, isa: str = ""
) -> tuple[Tensor, Tensor]:
    """x + gate·y, and its LayerNorm modulated as in `modulate`."""
    from dar_kernels import _native

    residual, modulated = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    _native.modulate(
        _rows(x), _rows(y), _rows(gate), _rows(shift), _rows(scale), residual, modulated, EPS,
        torch.get_num_threads(), isa,
    )  # fmt: skip
    return residual, modulated


def adaln_modulate(
    x: Tensor, features: Tensor, weight: Tensor | PackedWeight, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The modulated LayerNorm, and the other four parts of the projection `[B, N, 4 D]`."""
    projected = linear(features.detach(), weight, bias.detach())
    D = x.shape[-1]
    shift, scale = projected[..., :D], projected[..., D : 2 * D]
    return modulate(x, shift, scale), projected[..., 2 * D :]


def adaln_cross_attention(
    x: Tensor,
    q_weight: Tensor | PackedWeight,
    q_bias: Tensor,
    q_norm_weight: Tensor,
    q_norm_bias: Tensor,
    keys: Tensor,
    values_out: Tensor,
    out_bias: Tensor,
    time: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    isa: str = "",
) -> Tensor:
    """silu(time + attention of LN(x) over the group's keys), the output projection in the values.

    Two products by the library, three passes over rows: LN, the key weights `[B, N, H·Q]` with
    norm, rotation and softmax, and the sum under SiLU.
    """
    from dar_kernels import _native

    B, N, D = x.shape
    H, Q = keys.shape[1:3]
    threads = torch.get_num_threads()
    q = linear(modulate(x, None, None, isa=isa), q_weight, q_bias.detach())
    weights = torch.empty((B, N, H * Q), dtype=x.dtype)
    norm = [w.detach().to(x.dtype).contiguous() for w in (q_norm_weight, q_norm_bias)]
    _native.key_weights(
        q, norm[0], norm[1], cos.contiguous(), sin.contiguous(), keys.detach().contiguous(),
        weights, EPS, threads, isa,
    )  # fmt: skip
    s = torch.bmm(weights, values_out.detach().reshape(B, H * Q, D))
    out = torch.empty_like(s)
    bias = (time + out_bias).detach()[:, None].to(x.dtype)
    _native.bias_silu(s, bias, out, threads, isa)
    return out
