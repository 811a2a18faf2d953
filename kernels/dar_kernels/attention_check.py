"""Holds a back end of `attention` to the definition in fp64: outputs, gradients, small shapes.

A few milliseconds on a GPU, and the first call of a library. `dar doctor --self-test` runs it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dar_kernels.attention import OP, attention, attention_ref
from dar_kernels.attention_parts import KINDS, Kind, kind_of

SIZES: tuple[tuple[int, int, int | None], ...] = (  # queries, keys, prefix: each kind twice
    (20, 20, None), (7, 150, None), (20, 7, None), (150, 30, None), (20, 20, 0), (150, 150, 1),
    (7, 20, 0), (70, 150, 30), (20, 20, 9), (150, 150, 70), (100, 150, 90),
)  # fmt: skip
WIDTHS = (8, 16, 64)
HEADS = ((2, 2), (4, 2))  # of queries, of keys
EPS = torch.finfo(torch.float32).eps


class Case(NamedTuple):
    """A call of a self-test."""

    kind: Kind
    queries: int
    keys: int
    prefix: int | None
    heads: int
    key_heads: int
    head_dim: int


class SelfTest(NamedTuple):
    """What a self-test found; `worst` is the relative error that is nearest to what is allowed."""

    implementation: str
    device: str
    dtype: str
    cases: int  # that it ran
    worst: float | None  # ‖y - truth‖ / max(1, ‖truth‖) of an output or gradient
    allowed: float | None  # twice that of the definition in this dtype
    case: str | None  # the call of `worst`, or the one that raised
    error: str | None  # why it cannot run, or what it raised

    @property
    def passed(self) -> bool:
        """Whether it ran, and within what is allowed."""
        if self.error is not None or self.worst is None or self.allowed is None:
            return False
        return self.worst <= self.allowed


def self_test(
    implementation: str, device: str = "cpu", dtype: torch.dtype | None = None
) -> SelfTest:
    """Outputs and gradients of a back end on every kind of call that it takes.

    Args:
        implementation: its name.
        device: a device type, `cpu` or `cuda`.
        dtype: None: bf16.

    Raises:
        ValueError: where there is no back end of that name.
    """
    dtype = torch.bfloat16 if dtype is None else dtype
    found = OP.named(implementation)
    ran, worst, allowed, where = 0, 0.0, EPS, None
    reason = found.why_not(device, dtype, named=True, grad=True)
    about = found.name, device, str(dtype).removeprefix("torch.")
    if reason is not None:
        return SelfTest(*about, 0, None, None, None, reason)
    for case in _cases():
        call = case.head_dim, case.heads != case.key_heads, case.kind
        if found.why_not(device, dtype, named=True, grad=True, call=call) is not None:
            continue
        ran += 1
        try:
            error, bound = _errors(found.name, case, torch.device(device), dtype)
        except Exception as raised:  # whatever a library raises is the finding
            text = f"{type(raised).__name__}: {raised}"
            return SelfTest(*about, ran, None, None, str(case), text)
        if where is None or not error / bound <= worst / allowed:  # NaN is the worst
            worst, allowed, where = error, bound, str(case)
    if where is None:
        return SelfTest(*about, 0, None, None, None, "takes none of the calls")
    return SelfTest(*about, ran, worst, allowed, where, None)


def _cases() -> Iterator[Case]:
    for queries, keys, prefix in sorted(SIZES, key=lambda s: KINDS.index(kind_of(*s))):
        for heads, key_heads in HEADS:
            for head_dim in WIDTHS:
                kind = kind_of(queries, keys, prefix)
                yield Case(kind, queries, keys, prefix, heads, key_heads, head_dim)


def _errors(name: str, case: Case, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """The largest error beside what is allowed for it: of the output and the three gradients."""
    generator = torch.Generator().manual_seed(case.queries)

    def rows(length: int, heads: int) -> Tensor:
        x = torch.randn(2, length, heads, case.head_dim, generator=generator)
        return x.to(device, dtype).transpose(1, 2)

    q, dy = rows(case.queries, case.heads), rows(case.queries, case.heads)
    k, v = rows(case.keys, case.key_heads), rows(case.keys, case.key_heads)

    def run(way: str | None, to: torch.dtype) -> list[Tensor]:
        a, b, c = (x.to(to).detach().requires_grad_() for x in (q, k, v))
        if way is None:
            y = attention_ref(a, b, c, case.prefix)
        else:
            y = attention(a, b, c, prefix=case.prefix, implementation=way)
        return [y, *torch.autograd.grad(y, (a, b, c), dy.to(to))]

    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        truth, ours, same = run(None, torch.float64), run(name, dtype), run(None, dtype)
    found = [
        (_relative(ours[i], truth[i]), 2 * _relative(same[i], truth[i]) + EPS) for i in range(4)
    ]
    return max(found, key=lambda e: e[0] / e[1] if e[0] == e[0] else torch.inf)


def _relative(x: Tensor, truth: Tensor) -> float:
    """‖x - truth‖ / ‖truth‖; a gradient that is zero but for rounding counts as it is."""
    x, truth = x.detach(), truth.detach()
    return float((x.double() - truth).norm() / truth.norm().clamp(min=1.0))


__all__ = ["SelfTest", "self_test"]
