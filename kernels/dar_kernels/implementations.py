"""An op's implementations as nearly every op declares them: by Triton, by C++, by PyTorch."""

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

from dar_kernels import native, triton_support
from dar_kernels.dispatch import Implementation

P = ParamSpec("P")
R = TypeVar("R")


def by_triton(run: Callable[P, R]) -> Implementation[P, R]:
    """Triton kernels: on CUDA, and interpreted on the CPU where they are named."""
    return Implementation(
        name="triton",
        run=run,
        devices=("cuda",),
        on_request=("cpu",),
        dtypes=triton_support.TRITON_DTYPES,
        missing=triton_support.missing,
    )


def by_native(
    run: Callable[P, R],
    dtypes: Sequence[torch.dtype],
    missing: Callable[[], str | None] = native.missing,
) -> Implementation[P, R]:
    """C++ on the CPU, in these dtypes, without gradients."""
    return Implementation(
        name="native",
        run=run,
        devices=("cpu",),
        dtypes=tuple(dtypes),
        backward=False,
        missing=missing,
    )


def by_torch(run: Callable[P, R]) -> Implementation[P, R]:
    """PyTorch: everywhere."""
    return Implementation(name="torch", run=run)
