"""A prefix mask as calls that a flash kernel knows: all keys, or causal from the bottom right.

Queries before the prefix see all keys before it; those behind it see every key up to their own.
With P patches and N queries these are P² + N·(P + N) scores, of which N²/2 are skipped, in place of
the (P + N)² of a dense mask. What the parts return goes side by side, token by token.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# all keys; all keys, fewer than queries; causal, as many keys; causal, more keys; both in one call
Kind = Literal["full", "wide", "causal", "corner", "prefix"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Kernel = Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # True: causal from the bottom right
Run = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


class Part(NamedTuple):
    """Queries start … stop - 1 over the first `keys` keys."""

    start: int
    stop: int
    keys: int
    causal: bool


def _fact(condition: bool) -> bool:
    """A symbol, where torch.compile traces sizes, as a constant of the graph under a guard."""
    return True if condition else False


def width_of(q: Tensor) -> int:
    """The head width, known to a compiler even where it traces sizes."""
    return len(range(q.shape[-1]))


def is_grouped(q: Tensor, k: Tensor) -> bool:
    """Whether several heads of queries share one of keys."""
    return _fact(q.shape[1] != k.shape[1])


def parts(queries: int, keys: int, prefix: int | None) -> tuple[Part, ...]:
    """The one or two calls that make up a prefix mask; `attention` says what the prefix means."""
    if prefix is None or prefix >= keys:
        return (Part(0, queries, keys, False),)
    past = keys - queries  # the first query's position
    if prefix <= past + 1:
        return (Part(0, queries, keys, _fact(queries > 1)),)
    before = prefix - past
    return Part(0, before, prefix, False), Part(before, queries, keys, _fact(queries - before > 1))


def kind_of(queries: int, keys: int, prefix: int | None) -> Kind:
    """What a back end must know to run the call."""
    first, *rest = parts(queries, keys, prefix)
    if rest:
        return "prefix"
    if not first.causal:
        return "wide" if queries > keys else "full"
    return "causal" if queries == keys else "corner"


def by_parts(kernel: Kernel) -> Run:
    """The function of a prefix made of one that takes a kernel's two kinds."""

    def run(q: Tensor, k: Tensor, v: Tensor, prefix: int | None) -> Tensor:
        calls = parts(q.shape[2], k.shape[2], prefix)
        if len(calls) == 1:
            return kernel(q, k, v, calls[0].causal)
        pieces = [
            kernel(q[:, :, p.start : p.stop], k[:, :, : p.keys], v[:, :, : p.keys], p.causal)
            for p in calls
        ]
        return torch.cat([y.transpose(1, 2) for y in pieces], 1).transpose(1, 2)  # as kernels write

    return run


def corner_by_square(kernel: Kernel) -> Kernel:
    """For kernels that align causal order to the top left: zero queries fill up the square.

    Nk²/2 scores where the corner has Nq·(Nk - Nq/2): a third more for Nk = 2 Nq.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        past = k.shape[2] - q.shape[2]
        if not causal or past == 0:
            return kernel(q, k, v, causal)
        return kernel(F.pad(q, (0, 0, past, 0)), k, v, True)[:, :, past:]

    return run


def seen(queries: int, keys: int, prefix: int, device: torch.device) -> Tensor:
    """bool `[Nq, Nk]`: where a query looks."""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask | (torch.arange(keys, device=device) < prefix)


__all__ = [
    "KINDS", "Kernel", "Kind", "Part", "Run", "by_parts", "corner_by_square", "is_grouped",
    "kind_of", "parts", "seen", "width_of",
]  # fmt: skip
