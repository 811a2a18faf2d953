"""Every Triton kernel × every preset × {sm_80, sm_90}, compiled without a GPU: what each one needs.

    python bench/aot.py [--module NAME ...] [--list] [--write] [--out FILE]

Exits 1 where a kernel does not compile, spills registers, or needs more registers or shared memory
than the chip has. The results are held against kernels/RESOURCES.md, which --write writes anew: its
figures where the Triton version is that of the page, its rows always. GROUPED is prior L with the
query heads in groups, as a configuration may have them and no preset has. Two processes; Triton's
cache makes a second run quick. The last line is one JSON document.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Iterable
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import dar_kernels
from dar_fast.bench.measure import finish
from dar_fast.files import atomic_write
from dar_kernels.aot import (
    ARCHITECTURES,
    DecoderShape,
    Resources,
    Variant,
    compile_variant,
)
from presets import shapes

PAGE = Path(__file__).parents[1] / "kernels" / "RESOURCES.md"
REGISTERS = 255  # that one thread can have
PROCESSES = 2
VERSION = "Triton "
GROUPED = DecoderShape(dim=1024, heads=16, kv_heads=4, hidden_dim=2816, vocab_size=16_384)


class Row(NamedTuple):
    """A line of the table. Variants that differ in strides or alignment only share one."""

    module: str  # of the kernel
    kernel: str
    key: str
    architecture: int


Table = dict[Row, Resources]


def every_module() -> list[ModuleType]:
    names = [f"dar_kernels.{m.name}" for m in pkgutil.iter_modules(dar_kernels.__path__)]
    return [importlib.import_module(name) for name in names if not name.endswith("._native")]


def op_modules() -> list[str]:
    """The modules of dar_kernels that have an op and its `variants`."""
    return [m.__name__ for m in every_module() if hasattr(m, "OP") and hasattr(m, "variants")]


def not_covered(table: Iterable[Row]) -> list[str]:
    """The kernels that no preset launches: nothing would be known of them."""
    known = {(row.module, row.kernel) for row in table}
    found = []
    for module in every_module():
        home = module.__name__.removeprefix("dar_kernels.")
        for name, value in vars(module).items():
            own = getattr(getattr(value, "fn", None), "__module__", None) == module.__name__
            if own and name.endswith("_kernel") and (home, name.strip("_")) not in known:
                found.append(f"{home} {name}: no variant")
    return found


def jobs(names: list[str]) -> dict[tuple[Any, ...], tuple[Row, Variant]]:
    """Every distinct variant for every chip, in an order that is the same in every process."""
    found = {}
    for name in names:
        module = importlib.import_module(name)
        for shape in (*shapes().values(), GROUPED):
            for v in module.variants(shape):
                home = v.kernel.fn.__module__.removeprefix("dar_kernels.")
                same = (v.signature, v.constants, v.options)
                identity = (home, v.name, *(repr(sorted(d.items())) for d in same), v.aligned)
                for architecture in v.architectures:
                    row = Row(home, v.name, v.key(), architecture)
                    found[*identity, architecture] = row, v
    return found


_JOBS: list[tuple[Row, Variant]] = []  # of a worker


def _start(names: list[str]) -> None:
    _JOBS.extend(jobs(names).values())


def _compile(index: int) -> Resources | str:
    row, variant = _JOBS[index]
    try:
        return compile_variant(variant, row.architecture)
    except Exception as error:  # of the compiler, of any kind: the others go on
        return f"{type(error).__name__}: {error}"


def failures(row: Row, found: Resources | str) -> list[str]:
    """Why this result is not acceptable."""
    if isinstance(found, str):
        return [found]
    reasons = []
    if found.stack > 0:
        reasons.append(f"spills {found.stack} bytes a thread")
    if found.shared > ARCHITECTURES[row.architecture]:
        limit = ARCHITECTURES[row.architecture]
        reasons.append(f"{found.shared} bytes of shared memory, the chip has {limit}")
    if found.registers > REGISTERS:
        reasons.append(f"{found.registers} registers, a thread can have {REGISTERS}")
    return reasons


def page(table: Table, version: str) -> str:
    """The table as Markdown, sorted."""
    lines = [
        "# What each kernel needs of the chip", "",
        "Read from the cubin, per variant that a preset launches; nothing was run. Registers are a "
        "thread's, stack (spills) is", "bytes a thread, shared memory bytes a block. Made by "
        "`make aot WRITE=1`; a spill fails `make aot`.", "", f"{VERSION}{version}", "",
    ]  # fmt: skip
    head = ""
    for row, r in sorted(table.items()):
        if row.module != head:
            head = row.module
            lines += [
                "",
                f"## {head}",
                "",
                "| kernel | sm | registers | stack | shared | variant |",
            ]
            lines += ["|---|---|---|---|---|---|"]
        figures = f"{r.registers} | {r.stack} | {r.shared}"
        lines.append(f"| {row.kernel} | {row.architecture} | {figures} | {row.key} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def committed() -> tuple[str | None, Table]:
    """The Triton version and the table of the page; none and nothing where there is no page."""
    version, module, table = None, "", {}
    for line in PAGE.read_text().splitlines() if PAGE.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith(VERSION):
            version = line.removeprefix(VERSION)
        elif line.startswith("## "):
            module = line[3:]
        elif len(cells) == 6 and cells[1].isdigit():
            numbers = (int(cell) for cell in cells[2:5])
            table[Row(module, cells[0], cells[5], int(cells[1]))] = Resources(*numbers)
    return version, table


def differences(table: Table, old: Table, figures: bool) -> list[str]:
    """What the page does not say of `table`, or says of variants that are no more."""
    lines = [f"not in the page: {' '.join(map(str, row))}" for row in table.keys() - old.keys()]
    lines += [f"no more: {' '.join(map(str, row))}" for row in old.keys() - table.keys()]
    for row in table.keys() & old.keys() if figures else ():
        if table[row] != old[row]:
            lines.append(f"{' '.join(map(str, row))}: {tuple(table[row])}, was {tuple(old[row])}")
    return sorted(lines)


def compile_all(names: list[str]) -> tuple[Table, list[str]]:
    """The worst figures of each row, and the failures by name; prints rows as they come."""
    rows = [row for row, _ in jobs(names).values()]
    table: Table = {}
    failed = []
    with get_context("spawn").Pool(PROCESSES, _start, (names,)) as pool:
        results = pool.imap(_compile, range(len(rows)), chunksize=4)
        for row, found in zip(rows, results, strict=True):
            name = f"{row.module} {row.kernel} sm_{row.architecture} [{row.key}]"
            failed += [f"{name}: {reason}" for reason in failures(row, found)]
            if isinstance(found, Resources):
                both = (found, table.get(row, found))
                table[row] = Resources(*(max(pair) for pair in zip(*both, strict=True)))
                print(f"{name} | {found.registers} registers | {found.stack} stack | "
                      f"{found.shared} shared", flush=True)  # fmt: skip
    return table, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--module", action="append", help="only this one, as it is imported")
    parser.add_argument("--list", action="store_true", help="compile nothing: compare the rows")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    parser.add_argument("--out", type=Path, help="write the JSON document there too")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("expected an environment without TRITON_INTERPRET=1: nothing would compile")
    import triton

    start = time.perf_counter()
    names = args.module or op_modules()
    version, old = committed()
    failed: list[str] = []
    if args.list:
        table = {row: Resources(0, 0, 0) for row, _ in jobs(names).values()}
    else:
        table, failed = compile_all(names)
    if not args.module:
        failed += not_covered(table)
    else:
        old = {row: r for row, r in old.items() if row.module in {row.module for row in table}}
    changed = differences(table, old, figures=not args.list and version == triton.__version__)
    if args.write and not (args.list or args.module or failed):
        with atomic_write(PAGE) as temporary:
            temporary.write_text(page(table, triton.__version__))
    for line in changed:
        print(f"differs from {PAGE.name}: {line}")
    for line in failed:
        print(f"FAILED {line}")
    worst = {
        f"{what} sm_{architecture}": max(
            (getattr(r, what) for row, r in table.items() if row.architecture == architecture),
            default=0,
        )
        for architecture in ARCHITECTURES
        for what in Resources._fields
    }
    document = {
        "bench": "aot", "triton": triton.__version__, "triton_of_page": version,
        "modules": len(names), "kernels": len({row.kernel for row in table}), "rows": len(table),
        "worst": worst, "failures": failed, "differences": changed,
        "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    finish(document, args.out)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
