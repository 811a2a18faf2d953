"""`doctor` tells the truth about this machine, in JSON and to a person."""

import io
import json

import numpy
import torch
from rich.console import Console

import dar_fast
import dar_kernels
from dar_fast import doctor as module
from dar_fast.doctor import doctor, render
from dar_kernels import native
from dar_kernels.attention import OP as ATTENTION
from dar_kernels.attention_check import SelfTest


def shown(report, width=200):
    stream = io.StringIO()
    render(report, Console(file=stream, width=width))
    return stream.getvalue()


def test_report_is_plain_values():
    report = doctor()
    assert json.loads(json.dumps(report)) == report


def test_versions_and_devices():
    report = doctor()
    assert report["versions"]["dar_fast"] == dar_fast.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["numpy"] == numpy.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["isa_supported"] == list(native.isa_supported())
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    assert bool(report["cuda"]["why_not"]) == (not torch.cuda.is_available())


def test_ops_are_those_that_will_run():
    report = doctor()
    for op in dar_kernels.OPS:
        for device in ("cpu", "cuda"):
            chosen = report["ops"][op.name][device]
            assert chosen["implementation"] == op.choose(device, torch.float32).name
            assert all(chosen["others"].values())


def test_missing_package_says_how_to_install(monkeypatch):
    present = {"numpy": "2.0", "lpips": "0.1.4"}
    monkeypatch.setattr(module, "_version", present.get)
    report = doctor()
    assert report["packages"]["lpips"]["version"] == "0.1.4"
    assert report["packages"]["flash-attn"]["version"] is None
    text = shown(report)
    assert "pip install 'dar-fast[flash-attn]'" in text
    assert "pip install triton" in text
    assert "0.1.4" in text


def test_page_names_every_choice():
    report = doctor()
    text = shown(report)
    assert torch.__version__ in text
    for op, devices in report["ops"].items():
        assert op in text
        for choice in devices.values():
            for why in choice["others"].values():
                assert why in text


def test_page_without_the_extension(monkeypatch):
    report = doctor()
    report["cpu"] |= {"isa": None, "native_missing": "not built, because of a test"}
    assert "not built, because of a test" in shown(report)


def test_page_with_a_gpu():
    report = doctor()
    device = {"name": "NVIDIA H100", "capability": "9.0", "memory_gib": 79.1}
    report["cuda"] = {"devices": [device], "why_not": None}
    assert "NVIDIA H100, 9.0, 79.1 GiB" in shown(report)


def test_back_ends_of_attention_are_explained():
    report = doctor()["attention"]
    names = {i.name for i in ATTENTION.implementations}
    assert set(report["back_ends"]) == names and report["self_test"] is None
    for device in ("cpu", "cuda"):
        chosen = [n for n, why in report["back_ends"].items() if why[device] == "chosen"]
        assert chosen == [ATTENTION.choose(device, torch.bfloat16).name]
    text = shown(doctor())
    assert "sdpa-cudnn" in text and "What runs:" in text and "Self-test" not in text


def test_self_test_of_attention_is_shown(monkeypatch):
    passing = SelfTest("sdpa", "cpu", "float32", 66, 1e-7, 2e-7, "a call", None)
    wrong = passing._replace(worst=3.0)
    broken = SelfTest("sdpa", "cpu", "float32", 1, None, None, "a call", "RuntimeError: no image")
    for result, shown_as in (
        (passing, "passed  │ 1.0e-07 of 2.0e-07 allowed, 66 calls"),
        (wrong, "FAILED  │ 3.0e+00 of 2.0e-07 allowed, 66 calls; a call"),
        (broken, "FAILED  │ RuntimeError: no image in a call"),
    ):
        monkeypatch.setattr(module, "self_test", lambda *about, result=result: result)
        report = doctor(test_attention=True)
        assert json.loads(json.dumps(report)) == report
        assert {t["passed"] for t in report["attention"]["self_test"]} == {result.passed}
        assert shown_as in shown(report)
