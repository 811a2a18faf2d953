"""What is here: versions, devices, and which implementation every op will use and why not another.

`doctor` returns plain values that JSON can carry; `render` shows them to a person.
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dar_fast
import dar_kernels
from dar_kernels import native
from dar_kernels.attention import OP as ATTENTION
from dar_kernels.attention import RULE
from dar_kernels.attention_check import SelfTest, self_test

CORE = ("numpy", "safetensors", "pillow", "tyro", "rich")
TRITON_MISSING = "not installed; CUDA builds of torch bring it, on Linux: pip install triton"
# what is optional, what it is for, and the command that brings it
OPTIONAL = {
    "flash-attn": ("attention on Ampere and later", "pip install 'dar-fast[flash-attn]'"),
    "flash-attn-4": ("attention on Hopper and later", "pip install 'dar-fast[flash-attn-4]'"),
    "xformers": ("attention", "pip install 'dar-fast[xformers]'"),
    "torchvision": ("the networks behind lpips", "pip install torchvision"),
    "lpips": ("perceptual loss", "pip install 'dar-fast[train]'"),
    "timm": ("alignment loss", "pip install 'dar-fast[train]'"),
    "tensorboard": ("training curves", "pip install 'dar-fast[train]'"),
    "matplotlib": ("curves as pictures", "pip install 'dar-fast[train]'"),
    "resvg-py": ("building the emoji data set", "pip install 'dar-fast[train]'"),
    "torch-fidelity": ("FID and its kin", "pip install 'dar-fast[eval]'"),
}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"devices": [], "why_not": f"torch {torch.__version__} is built without CUDA"}
    if not torch.cuda.is_available():
        return {"devices": [], "why_not": f"no device or driver for CUDA {torch.version.cuda}"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
            for device in devices
        ],
        "why_not": None,
    }


def _attention(test: bool) -> dict[str, Any]:
    """Which back end of attention runs bf16, why not each other one, and what a self-test finds."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    names = [i.name for i in ATTENTION.implementations]
    back_ends: dict[str, dict[str, str]] = {name: {} for name in names}
    for device in ("cpu", "cuda"):
        choice = ATTENTION.explain(device, torch.bfloat16)
        for name in names:
            back_ends[name][device] = choice.others.get(name, "chosen")
    tests: list[SelfTest] = []
    if test:
        for name in names:
            for device in devices:
                for dtype in (torch.bfloat16, torch.float32):
                    can = ATTENTION.named(name).why_not(device, dtype, named=True, grad=True)
                    if can is None:
                        tests.append(self_test(name, device, dtype))
    return {
        "rule": RULE,
        "back_ends": back_ends,
        "self_test": [{**t._asdict(), "passed": t.passed} for t in tests] if test else None,
    }


def doctor(test_attention: bool = False) -> dict[str, Any]:
    """The state of this installation, in values that JSON can carry.

    Args:
        test_attention: hold every back end of attention that runs here to its definition in fp64.

    Returns:
        `versions` (name to version; `triton` to why it is missing), `cpu`, `cuda`, `ops` (op to
        device type to `implementation` and `others`, name to reason), `attention` (`rule`,
        `back_ends`: name to device type to `chosen` or why not in bf16, `self_test`) and optional
        `packages`.
    """
    isa = native.isa_supported()
    return {
        "versions": {
            "dar_fast": dar_fast.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "triton": _version("triton") or TRITON_MISSING,
            **{name: _version(name) or "not installed" for name in CORE},
        },
        "cpu": {
            "model": cpu_model(),
            "isa": isa[0] if isa else None,
            "isa_supported": list(isa),
            "threads": torch.get_num_threads(),
            "threading": native.threading(),
            "native_missing": native.missing(),
        },
        "cuda": _cuda(),
        "ops": {
            op: {device: choice._asdict() for device, choice in devices.items()}
            for op, devices in dar_kernels.report().items()
        },
        "attention": _attention(test_attention),
        "packages": {
            name: {"version": _version(name), "purpose": purpose, "install": install}
            for name, (purpose, install) in OPTIONAL.items()
        },
    }


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # plain text: "[train]" is no markup
    return table


def _verdict(test: dict[str, Any]) -> tuple[str, str]:
    """Passed or failed, and by how much or why."""
    verdict = "passed" if test["passed"] else "FAILED"
    if test["error"] is not None:
        where = "" if test["case"] is None else f" in {test['case']}"
        return verdict, f"{test['error']}{where}"
    found = f"{test['worst']:.1e} of {test['allowed']:.1e} allowed, {test['cases']} calls"
    return verdict, found if test["passed"] else f"{found}; {test['case']}"


def render(report: dict[str, Any], console: Console) -> None:
    """Shows what `doctor` returned."""
    cpu, cuda = report["cpu"], report["cuda"]
    here = list(report["versions"].items())
    here.append(("CPU", f"{cpu['model']}, {cpu['threads']} threads"))
    here.append(("C++ ops", cpu["native_missing"] or f"{cpu['isa']} ({cpu['threading']})"))
    for device in cuda["devices"]:
        name, capability, memory = device["name"], device["capability"], device["memory_gib"]
        here.append(("CUDA", f"{name}, {capability}, {memory} GiB"))
    if cuda["why_not"]:
        here.append(("CUDA", f"none: {cuda['why_not']}"))
    console.print(_table("Installation", ("what", "here"), here))

    ops = [
        (
            op,
            device,
            choice["implementation"],
            "\n".join(": ".join(o) for o in choice["others"].items()),
        )
        for op, devices in report["ops"].items()
        for device, choice in devices.items()
    ]
    console.print(_table("Ops", ("op", "on", "runs", "why not another"), ops))

    attention = report["attention"]
    back_ends = [(name, why["cpu"], why["cuda"]) for name, why in attention["back_ends"].items()]
    title = "Back ends of attention in bf16"
    console.print(_table(title, ("back end", "on a CPU", "on CUDA"), back_ends))
    console.print(Text(f"What runs: {attention['rule']}."))
    if attention["self_test"] is not None:
        tests = [
            (t["implementation"], f"{t['device']}, {t['dtype']}", *_verdict(t))
            for t in attention["self_test"]
        ]
        columns = ("back end", "on", "verdict", "worst relative error beside fp64")
        console.print(_table("Self-test of attention, with gradients", columns, tests))

    packages = [
        (name, package["purpose"], package["version"] or package["install"])
        for name, package in report["packages"].items()
    ]
    console.print(_table("Optional packages", ("package", "for", "here"), packages))


__all__ = ["doctor", "render"]
