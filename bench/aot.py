"""Every Triton kernel × every preset × {sm_80, sm_90}, compiled without a GPU: what each one needs.

    python bench/aot.py [--module NAME ...] [--list] [--write] [--out FILE]

Exits 1 where a kernel does not compile, spills registers, or needs more registers or shared memory
than the chip has. The results are held against kernels/RESOURCES.md, which --write writes anew: its
figures where the Triton version is that of the page, its rows always. Two processes; Triton's cache
makes a second run quick. The last line is one JSON document.
"""

import argparse
import importlib
import os
import pkgutil
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import dar_kernels
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.files import atomic_write
from dar_kernels.aot import (
    ARCHITECTURES,
    DecoderShape,
    DenoiserShape,
    Resources,
    Shape,
    Variant,
    compile_variant,
)
from measure import finish

PAGE = Path(__file__).parents[1] / "kernels" / "RESOURCES.md"
REGISTERS = 255  # that one thread can have
PROCESSES = 2
VERSION = "Triton "


class Row(NamedTuple):
    """A line of the table. Variants that differ in strides or alignment only share one."""

    module: str  # of the kernel
    kernel: str
    key: str
    architecture: int


Table = dict[Row, Resources]


def shapes() -> Iterator[Shape]:
    """The sizes of every preset."""
    for prior in PRIORS.values():
        yield DecoderShape(
            dim=prior.dim, heads=prior.heads, kv_heads=prior.key_value_heads,
            hidden_dim=prior.hidden_dim, vocab_size=prior.vocab_size,
        )  # fmt: skip
    for tokenizer in TOKENIZERS.values():
        dit = tokenizer.dit
        yield DenoiserShape(
            dim=dit.dim, head_dim=dit.head_dim, condition_tokens=tokenizer.group_size,
            patches=(tokenizer.image_size // dit.patch_size) ** 2, patch_size=dit.patch_size,
            codebook_size=tokenizer.codebook_size, code_dim=tokenizer.code_dim,
        )  # fmt: skip


def modules() -> list[str]:
    """The modules of dar_kernels that have `variants`."""
    names = [f"dar_kernels.{m.name}" for m in pkgutil.iter_modules(dar_kernels.__path__)]
    found = (importlib.import_module(name) for name in names if not name.endswith("._native"))
    own = ((m.__name__, getattr(vars(m).get("variants"), "__module__", None)) for m in found)
    return [name for name, origin in own if name == origin]


def jobs(names: list[str]) -> dict[tuple[Any, ...], tuple[Row, Variant]]:
    """Every distinct variant for every chip, in an order that is the same in every process."""
    found = {}
    for name in names:
        module = importlib.import_module(name)
        for shape in shapes():
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
    names = args.module or modules()
    version, old = committed()
    failed: list[str] = []
    if args.list:
        table = {row: Resources(0, 0, 0) for row, _ in jobs(names).values()}
    else:
        table, failed = compile_all(names)
    if args.module:
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
