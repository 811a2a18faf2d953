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


def _cpu_model() -> str:
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


def doctor() -> dict[str, Any]:
    """The state of this installation, in values that JSON can carry.

    Returns:
        `versions` (name to version; `triton` to why it is missing), `cpu`, `cuda`, `ops` (op to
        device type to `implementation` and `others`, name to reason) and optional `packages`.
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
            "model": _cpu_model(),
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

    packages = [
        (name, package["purpose"], package["version"] or package["install"])
        for name, package in report["packages"].items()
    ]
    console.print(_table("Optional packages", ("package", "for", "here"), packages))


__all__ = ["doctor", "render"]
