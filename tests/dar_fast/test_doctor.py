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
