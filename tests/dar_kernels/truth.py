"""The rule that every op is held to: no less accurate than PyTorch in the same dtype, by fp64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dar_kernels import triton_support

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps
TRITON = triton_support.missing() is None  # interpreted on a CPU, or on a GPU


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """‖actual - truth‖ / ‖truth‖; the plain norm where the truth is zero."""
    truth = truth.detach()
    scale = truth.norm()
    return float((actual.detach().double() - truth).norm() / (scale if scale > 0 else 1))


def outputs_and_gradients(
    fn: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    rounded: torch.dtype,
    seed: int = 0,
) -> list[Tensor]:
    """Every output of fn(*inputs in dtype), then the gradient of each floating-point input.

    The upstream gradients are seeded and rounded, so every dtype meets the same ones.
    """
    cast = [
        x.detach().to(dtype).requires_grad_()
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    result = fn(*cast)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    leaves = [x for x in cast if isinstance(x, Tensor) and x.requires_grad]
    with_grad = [y for y in outputs if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    upstream = [
        torch.randn(y.shape, generator=generator).to(rounded).to(y.device, y.dtype)
        for y in with_grad
    ]
    gradients = torch.autograd.grad(with_grad, leaves, upstream) if with_grad else ()
    return [*outputs, *gradients]


def check_against_truth(
    ours: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    *,
    gradients: bool = True,
) -> None:
    """Each output and gradient of `ours`: err ≤ 2 · err of `reference` in the same dtype + eps.

    `reference` in fp64 on the same, already rounded, inputs is the truth.
    """
    rounded = [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    ]

    def run(fn: Callable[..., Any], to: torch.dtype) -> list[Tensor]:
        if gradients:
            return outputs_and_gradients(fn, rounded, to, dtype)
        with torch.no_grad():
            result = fn(
                *(
                    x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x
                    for x in rounded
                )
            )
        return [result] if isinstance(result, Tensor) else list(result)

    truth, mine, same = run(reference, torch.float64), run(ours, dtype), run(reference, dtype)
    for i, (t, o, r) in enumerate(zip(truth, mine, same, strict=True)):
        assert o.shape == t.shape, f"tensor {i}: {list(o.shape)} is not {list(t.shape)}"
        assert torch.isfinite(o).all() or not torch.isfinite(t).all(), f"tensor {i}: not finite"
        bound = 2 * relative_error(r, t) + EPS
        assert relative_error(o, t) <= bound, (
            f"tensor {i}: {relative_error(o, t):.2e} > {bound:.2e}"
        )
