"""Top-k and top-p of rows of logits, without sorting where a kernel does it.

Either keeps the logits of at least t, the least t with Σ w[logit > t] ≤ bound: w = 1 and k − 1 for
top-k, w = softmax and p for top-p. The kernel finds t in 32 bisections over the bits of an fp32
number, 2·V operations each, on a row in registers; sums are in a fixed order.
Source: Holtzman et al., The Curious Case of Neural Text Degeneration (2019), for top-p.
"""

import math

import torch
from torch import Tensor

from dar_kernels.triton_support import tl, triton

Setting = float | Tensor  # one for all rows, or one a row
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


def column(value: Setting, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A setting as a column, on the device of `like`: CUDA multiplies by 1 / number, we divide."""
    dtype = dtype or like.dtype
    if isinstance(value, Tensor):
        return value.to(dtype)[:, None]
    return torch.full((1, 1), value, dtype=dtype, device=like.device)


def filter_ref(logits: Tensor, top_k: Setting, top_p: Setting) -> Tensor:
    """Logits `[R, V]`, −inf where top-k, then top-p on what it left, removes a code.

    top-k keeps ties with the k-th. top-p keeps a code where the mass of strictly larger logits is
    ≤ top_p: without ties the mass before it in sorted order; of ties it keeps all or none.
    """
    V = logits.shape[-1]
    some_k = isinstance(top_k, Tensor) or 0 < top_k < V
    some_p = isinstance(top_p, Tensor) or top_p < 1
    if not (some_k or some_p):
        return logits
    k, p = column(top_k, logits, torch.int64), column(top_p, logits)
    ordered = logits.sort(dim=-1, descending=True).values
    kth = ordered.gather(-1, (k.expand(len(logits), 1) - 1).clamp(0, V - 1))
    least = torch.where((k > 0) & (k < V), kth, -math.inf)  # [R, 1]
    mass = ordered.masked_fill(ordered < least, -math.inf).softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
    last = ordered.masked_fill((before > p) & (p < 1), math.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < torch.maximum(least, last), -math.inf)


@triton.jit
def _flip(bits):
    """int32 in the order of the fp32 numbers whose bits are given, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _least(logits, weights, bound):
    """The least t with Σ weights[logits > t] ≤ bound; weights ≥ 0, so the sum falls as t rises."""
    low = tl.full([], -0x7F800001, tl.int32)  # of −inf
    high = _flip(tl.max(logits, 0).to(tl.int32, bitcast=True))
    for _ in range(32):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which does not overflow
        t = _flip(middle).to(tl.float32, bitcast=True)
        fits = tl.sum(tl.where(logits > t, weights, 0), 0) <= bound
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    return _flip(high).to(tl.float32, bitcast=True)


@triton.jit
def filter_row(logits, top_k, top_p, V):
    """`filter_ref` of one row, `[BLOCK_V]` fp32 without NaN; beyond V it holds −inf."""
    if (top_k > 0) & (top_k < V):
        ones = tl.full(logits.shape, 1, tl.int32)
        logits = tl.where(logits >= _least(logits, ones, top_k - 1), logits, float("-inf"))
    if top_p < 1:
        weights = tl.exp(logits - tl.maximum(tl.max(logits, 0), -LARGEST))
        t = _least(logits, weights, top_p * tl.sum(weights, 0))
        logits = tl.where(logits >= t, logits, float("-inf"))
    return logits
