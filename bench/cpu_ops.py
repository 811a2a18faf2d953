"""Every op on this CPU, one picture, each implementation beside the others.

    pytest bench/cpu_ops.py [-k "prior or v1"] [--benchmark-json FILE]

Tensors are bf16; the cases are those of gpu_kernels.py. Groups of the table are one op each.
Attention runs forward and backward, with its FLOPs over the least time: 4·Dh for each query and key
it sees, 10·Dh backward; a core of Zen 4 at 3.6 GHz does 230 GFLOP/s of products of bf16.
"""

from typing import Any, NamedTuple

import pytest
import torch

import cases_prior  # noqa: F401 (fills CASES)
import cases_tokenizer  # noqa: F401
import dar_kernels
from dar_kernels import UnavailableError
from dar_kernels.attention import attention
from kernel_cases import CASES, Make
from presets import shapes

PRESETS = ("prior L", "tokenizer v1")


class Heads(NamedTuple):
    """What one attention of a training step is over."""

    H: int
    Nq: int
    Nk: int
    Dh: int
    prefix: int | None

    def flops(self, backward: bool) -> int:
        first = self.Nk - self.Nq
        p = self.Nk if self.prefix is None else self.prefix
        seen = sum(min(self.Nk, max(p, first + i + 1)) for i in range(self.Nq))
        return (10 if backward else 4) * self.H * self.Dh * seen


ATTENTION = {
    "pixel DiT": Heads(8, 1024, 1024, 64, None),
    "encoder, patches": Heads(8, 256, 256, 64, None),
    "encoder, queries": Heads(8, 256, 512, 64, 256),
    "token decoder": Heads(8, 256, 256, 64, 0),
    "prior B": Heads(12, 256, 256, 64, 0),
    "demo": Heads(4, 100, 100, 32, 0),
}


@pytest.mark.parametrize("implementation", ["sdpa", "native"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(benchmark: Any, name: str, backward: bool, implementation: str) -> None:
    H, Nq, Nk, Dh, prefix = shape = ATTENTION[name]
    benchmark.group = f"attention {'backward' if backward else 'forward'}, {name}"
    torch.manual_seed(0)
    sizes = ((1, Nq, H, Dh), (1, Nk, H, Dh), (1, Nk, H, Dh))
    leaves = [torch.randn(size).bfloat16().requires_grad_() for size in sizes]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    try:
        y = attention(q, k, v, prefix=prefix, implementation=implementation)
    except UnavailableError as error:
        pytest.skip(str(error))
    dy = torch.randn_like(y)

    def forward() -> None:
        with torch.no_grad():
            attention(q, k, v, prefix=prefix, implementation=implementation)

    def gradients() -> None:
        torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)

    benchmark.pedantic(gradients if backward else forward, rounds=20, warmup_rounds=2)
    flops = shape.flops(backward)
    gflops = round(flops / benchmark.stats.stats.min / 1e9, 1)
    benchmark.extra_info.update(flops=flops, shape=str(tuple(shape)), gflops=gflops)


@pytest.mark.parametrize("implementation", ["torch", "native"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark: Any, name: str, preset: str, implementation: str) -> None:
    shape = shapes()[preset]
    kind, build = CASES[name]
    if not isinstance(shape, kind):
        pytest.skip("another kind of model")
    torch.manual_seed(0)
    benchmark.group = f"{name}, {preset}"
    with torch.no_grad():
        case = build(shape, 1, Make("cpu"))
        words = name.split()
        known = {i.name for op in dar_kernels.OPS if op.name in words for i in op.implementations}
        if implementation not in known:
            pytest.skip(f"has no {implementation}")
        try:
            case.run(implementation)
        except UnavailableError as error:
            pytest.skip(str(error))
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, shape=case.shape)
        benchmark.pedantic(case.run, (implementation,), rounds=5, warmup_rounds=1)
