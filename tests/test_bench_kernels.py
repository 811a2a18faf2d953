"""bench/gpu_kernels.py without a GPU: its cases and checks, and its table by a faked clock."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dar_kernels

ROOT = Path(__file__).parents[1]
NAMED = ("reference", "sdpa-flash")


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return import_module("gpu_kernels")


@pytest.fixture
def on_a_cpu(bench, monkeypatch):
    """The bench with tiny presets, PyTorch for Triton, no graphs and a clock that says 1 ms."""
    tiny = dict(zip(("prior L", "tokenizer v1"), bench.TINY, strict=True))
    monkeypatch.setattr(bench, "shapes", lambda: tiny)
    monkeypatch.setattr(bench, "Make", lambda _, **kw: MAKE("cpu", dtype=torch.float32, **kw))
    MAKE = import_module("kernel_cases").Make
    build = bench.build
    monkeypatch.setattr(
        bench, "build", lambda *args: replace(build(*args), implementations=("torch", "torch"))
    )
    monkeypatch.setattr(bench, "get_context", lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(bench, "graphed", lambda run: run)
    monkeypatch.setattr(bench, "device_seconds", lambda run: (run(), 1e-3)[1])
    rates = {"copy": 1e9, "torch.bfloat16": 1e9, "torch.float32": 1e9}
    monkeypatch.setattr(bench, "ceilings_here", lambda: rates)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    return bench


def test_every_op_with_a_kernel_has_a_case(bench):
    for op in dar_kernels.OPS:
        if any(i.name == "triton" for i in op.implementations):
            assert any(name.split(" ")[0] == op.name for name in bench.CASES), op.name
    assert "attention prior" in bench.CASES


def test_list_needs_no_gpu():
    command = [sys.executable, str(ROOT / "bench/gpu_kernels.py"), "--list", "--op", "swiglu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert json.loads(last)["cases"] == len(lines)
    wide = "swiglu | prior XL | 8 | [2048, 3584] | 44040192 bytes | 0 FLOPs"
    assert wide in lines


def test_rows_and_table(on_a_cpu):
    jobs = [job for job in on_a_cpu.jobs() if job.batch == 8 and job.op in ("swiglu", "vq_losses")]
    assert [job.backward for job in jobs] == [False, False, True, True]
    document = {"device": "none", "commit": "0", **on_a_cpu.time_all(jobs, seconds=60)}
    assert not document["skipped"]
    for row in document["rows"]:
        assert "failed" not in row, row
        assert set(row["seconds"]) == {"ours", "eager", "compiled"}
        assert row["tb_s"] == pytest.approx(row["bytes"] / 1e9)
        assert row["of_roof"] == pytest.approx(row["bytes"] / 1e6)
        assert set(row["ratios"].values()) == {1.0}
    text = on_a_cpu.table(document)
    assert "| swiglu | prior L | 8 | [2048, 96] | 1000.0 | 0.00 | 0 |" in text
    assert "| vq_losses and backward | tokenizer v1 | 8 | [2048, 8] of 64 | 1000.0 |" in text


def test_failures_and_lack_of_time_are_reported(on_a_cpu, monkeypatch):
    kind, build = on_a_cpu.CASES["swiglu"]

    def broken(shape, batch, make):
        case = build(shape, batch, make)

        def run(implementation):
            if implementation == "triton" or batch == 8:
                raise RuntimeError("illegal memory access")
            return case.run("torch")

        if batch == 1:
            raise MemoryError("out of memory")
        return on_a_cpu.Case(shape=case.shape, run=run, bytes=1)

    monkeypatch.setattr(on_a_cpu, "build", lambda op, *args: on_a_cpu.CASES[op][1](*args))
    monkeypatch.setitem(on_a_cpu.CASES, "swiglu", (kind, broken))
    jobs = [job for job in on_a_cpu.jobs() if job.op == "swiglu" and not job.backward][:3]
    document = on_a_cpu.time_all(jobs, seconds=60)
    half, none, nothing = document["rows"]
    assert half["failed"] == {"ours": "RuntimeError: illegal memory access"}
    assert set(half["seconds"]) == {"eager", "compiled"}
    assert none["failed"] == {"ours": "MemoryError: out of memory"}
    assert set(nothing["failed"]) == {"ours", "eager", "compiled"}
    text = on_a_cpu.table({"device": "none", "commit": "0", **document})
    assert "| swiglu | prior L | 8 | [2048, 96] | failed |" in text
    assert on_a_cpu.time_all(jobs, seconds=-1)["skipped"] == [str(job) for job in jobs]


def test_back_ends_of_attention_stand_side_by_side(on_a_cpu, monkeypatch):
    kind, build = on_a_cpu.CASES["attention encoder"]

    def some(shape, batch, make):
        return replace(build(shape, batch, make), implementations=("sdpa-masked", "sdpa", *NAMED))

    monkeypatch.setattr(on_a_cpu, "build", lambda op, *args: some(*args))
    monkeypatch.setitem(on_a_cpu.CASES, "attention encoder", (kind, some))
    jobs = [job for job in on_a_cpu.jobs() if job.op == "attention encoder" and job.batch == 8]
    document = on_a_cpu.time_all(jobs, seconds=60)
    for row, backward in zip(document["rows"], (False, True), strict=True):
        assert set(row["ratios"]) == {"eager", "compiled", "reference"}
        assert "sdpa-flash: runs on cuda only" in row["failed"]["sdpa-flash"]
        assert row["backward"] is backward
    text = on_a_cpu.table({"device": "none", "commit": "0", **document})
    assert "- × others of attention encoder | tokenizer v1 | 8: reference 1.00\n" in text


@pytest.mark.slow
def test_implementations_agree_at_a_tiny_size(bench):
    rows = bench.check()
    assert {row["op"] for row in rows} == set(bench.CASES)
    assert [row for row in rows if row["differs"]] == []
