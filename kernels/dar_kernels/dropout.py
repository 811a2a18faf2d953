"""y = x · mask / (1 − p), the mask drawn again for the gradient, not kept: 2·n·itemsize bytes.

On a CPU in C++: element i stays where a hash of (key, i) is at least p·2³², the key a draw from
torch's generator, so `torch.manual_seed` decides it as ever. Elsewhere torch's own dropout, which a
compiler fuses with what is around it. Source: Srivastava et al. (2014).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import native
from dar_kernels.checks import check_tensor
from dar_kernels.dispatch import Implementation, Op
from dar_kernels.implementations import by_torch

FLOATS = (torch.float32, torch.bfloat16)
KEYS = 2**62  # below the largest int64


def _masked(x: Tensor, key: Tensor, p: float) -> Tensor:
    from dar_kernels import _native

    x = x.detach().contiguous()
    out = torch.empty_like(x)
    _native.dropout(x.flatten(), out.view(-1), int(key), p, torch.get_num_threads())
    return out


@torch.library.custom_op("dar::dropout", mutates_args=())
def _dropout(x: Tensor, key: Tensor, p: float) -> Tensor:
    """`x` dropped out by the key, a scalar int64: the same elements for the same key."""
    return _masked(x, key, p)


@_dropout.register_fake
def _(x: Tensor, key: Tensor, p: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    _, key, ctx.p = inputs
    ctx.save_for_backward(key)


def _autograd(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
    return _dropout(dy, ctx.saved_tensors[0], ctx.p), None, None


_dropout.register_autograd(_autograd, setup_context=_setup_context)


def _compiled(x: Tensor, p: float) -> Tensor:
    result: Tensor = _dropout(x, torch.randint(KEYS, ()), p)
    return result


def _torch(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p)


OP = Op(
    name="dropout",
    implementations=(
        Implementation(
            name="native", run=_compiled, devices=("cpu",), dtypes=FLOATS, missing=native.missing
        ),
        by_torch(_torch),
    ),
)
_RUN = {"native": _compiled, "torch": _torch}


def dropout(x: Tensor, p: float, *, implementation: str | None = None) -> Tensor:
    """`x` with each element zero with probability `p`, the others over 1 − p.

    Args:
        x: floating point, any shape.
        p: in [0, 1).
        implementation: `native` (CPU, fp32 or bf16) or `torch`; None: the first that can run.

    Returns:
        As `x`; the same numbers for the same state of torch's generator. Differentiable.

    Raises:
        TypeError: where `x` is no floating point tensor.
        ValueError: where `p` is out of range.
        UnavailableError: where the named implementation cannot run here.
    """
    check_tensor(OP.name, "x", x, (...,))
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout: expected p in [0, 1), got {p}")
    if p == 0.0:
        return x
    return _RUN[OP.pick(x.device.type, x.dtype, implementation)](x, p)


__all__ = ["OP", "dropout"]
