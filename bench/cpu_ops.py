"""Every op on this CPU, one picture, each implementation beside the others.

    pytest bench/cpu_ops.py [-k "prior or v1"] [--benchmark-json FILE]

Tensors are bf16; the cases are those of gpu_kernels.py. Groups of the table are one op each.
"""

from typing import Any

import pytest
import torch

import cases_prior  # noqa: F401 (fills CASES)
import cases_tokenizer  # noqa: F401
import dar_kernels
from dar_kernels import UnavailableError
from kernel_cases import CASES, Make
from presets import shapes

PRESETS = ("prior L", "tokenizer v1")


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
        known = {i.name for op in dar_kernels.OPS if op.name in name for i in op.implementations}
        if implementation not in known:
            pytest.skip(f"has no {implementation}")
        try:
            case.run(implementation)
        except UnavailableError as error:
            pytest.skip(str(error))
        benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, shape=case.shape)
        benchmark.pedantic(case.run, (implementation,), rounds=5, warmup_rounds=1)
