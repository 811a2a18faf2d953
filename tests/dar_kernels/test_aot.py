"""bench/aot.py: every kernel compiles for both chips within their limits, and the page says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dar_kernels import triton_support

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not triton_support.INSTALLED, reason="Triton is not installed")

BAD = """
import triton
import triton.language as tl

from dar_kernels.aot import DenoiserShape, Variant


@triton.jit
def _spilling_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x))


@triton.jit
def _large_kernel(x_ptr, K, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    y = tl.zeros([N, N], tl.float32)
    for k in range(K):
        x = tl.load(x_ptr + k * N * N + i)
        y = tl.dot(x, x, y)
    tl.store(x_ptr + i, y.to(tl.float16))


def variants(shape):
    if isinstance(shape, DenoiserShape):
        options = {"enable_fp_fusion": True}
        yield Variant(
            kernel=_spilling_kernel,
            signature={"x_ptr": "*fp32"},
            constants={"N": 4096},
            options=options | {"num_warps": 1, "maxnreg": 64},
        )
        yield Variant(
            kernel=_large_kernel,
            signature={"x_ptr": "*fp16", "K": "i32"},
            constants={"N": 64},
            options=options | {"num_warps": 4, "num_stages": 32},
            architectures=(90,),
        )
        yield Variant(kernel=_large_kernel, signature={"x_ptr": "*fp16", "K": "i32"})
"""


def aot(*arguments, **environment):
    """Exit status and JSON document of the command, in a process that does not interpret."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | environment
    command = [sys.executable, str(ROOT / "bench" / "aot.py"), *arguments]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_page_lists_the_variants_there_are():
    status, document = aot("--list")
    assert status == 0
    assert document["rows"] > 100
    assert document["differences"] == [], "make aot WRITE=1"


@pytest.mark.slow
def test_spills_large_blocks_and_broken_kernels_fail(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    status, document = aot("--module", "bad", PYTHONPATH=os.pathsep.join(paths))
    assert status == 1
    spilled_80, spilled_90, large, *broken = document["failures"]
    for spilled, architecture in ((spilled_80, 80), (spilled_90, 90)):
        assert f"bad spilling_kernel sm_{architecture}" in spilled
        assert "bytes a thread" in spilled
    assert "bad large_kernel sm_90" in large
    assert "262144 bytes of shared memory, the chip has 232448" in large
    assert len(broken) == 2
    assert all("Error" in failure for failure in broken)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # 3 minutes on two free cores with an empty cache, 10 on busy ones
def test_every_kernel_compiles_within_the_limits():
    status, document = aot()
    assert document["failures"] == []
    assert status == 0
    assert document["differences"] == []
    assert document["worst"]["stack sm_80"] == document["worst"]["stack sm_90"] == 0
