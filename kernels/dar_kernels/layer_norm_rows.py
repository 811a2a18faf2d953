"""What the ops with LN without affine, eps 1e-6, share: one row a program."""

from typing import Any

from dar_kernels.checks import Dim
from dar_kernels.triton_support import launch_options, tl, triton

EPS = 1e-6
MAX_DIM = 16_384  # one program keeps a whole row in registers
TOKENS = ("B", "N", Dim("D", 1, MAX_DIM))


@triton.jit
def row_statistics(x, mask, D, eps):
    """Mean of an fp32 row in two parts, and 1 / deviation; `x` is 0 outside `mask`.

    The second part is the rounding of the first, which at 100 deviations from 0 would be the
    largest error of all.
    """
    mean = tl.sum(x, 0) / D
    centred = tl.where(mask, x - mean, 0.0)
    left = tl.sum(centred, 0) / D
    return mean, left, tl.rsqrt(tl.sum(centred * centred, 0) / D - left * left + eps)


@triton.jit
def normalise_row(x, mask, D, eps):
    """The normalised row, 0 outside `mask` as `x` is, and 1 / deviation."""
    mean, left, rstd = row_statistics(x, mask, D, eps)
    return tl.where(mask, (x - mean - left) * rstd, 0.0), rstd


@triton.jit
def normalise_row_backward(dx_hat, x_hat, rstd, D):
    """The gradient of the row from that of its normalised form."""
    return rstd * (dx_hat - tl.sum(dx_hat, 0) / D - x_hat * (tl.sum(dx_hat * x_hat, 0) / D))


def row_launch(D: int) -> tuple[int, dict[str, Any]]:
    """BLOCK_D and launch options of kernels with one row a program.

    Eight elements a thread, one 16-byte access in bf16, and no more than 16 warps. Chosen from AOT
    register counts; not timed.
    """
    block = int(triton.next_power_of_2(D))
    return block, launch_options(num_warps=min(16, max(1, block // 256)), num_stages=1)
