"""Every op over every preset on a GPU: achieved bytes and FLOPs a second beside what they are of.

    python bench/gpu_kernels.py [--op TEXT] [--preset TEXT] [--batch B ...] [--seconds S] [--out F]
    python bench/gpu_kernels.py --list | --check

Ours is `triton`, eager the `torch` implementation, compiled torch.compile of that for COMPILED
presets, library what a well-kept library has. Attention is by libraries alone, side by side: ours
is the one that runs where none is named, eager a dense mask. Each call is captured in a CUDA graph,
so these are the GPU's times; the second-level cache is flushed before each. The roof of a call is
the larger of its bytes at the bandwidth of a copy and its FLOPs at the rate of a large product,
both measured here. Cases come in the order of their worth, and those that do not fit the time are
named. --list needs no GPU; --check runs everything once at a tiny size on the CPU, Triton too under
TRITON_INTERPRET=1, and compares. The last line is one JSON document; F gets it, and a table
beside it in Markdown.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cases_prior  # noqa: F401 (fills CASES)
import cases_tokenizer  # noqa: F401
from dar_fast.bench.measure import (
    about,
    copy_bandwidth,
    device_seconds,
    finish,
    graphed,
    matrix_rate,
)
from dar_fast.files import atomic_write
from dar_kernels import UnavailableError
from dar_kernels.aot import DecoderShape, DenoiserShape, Shape
from kernel_cases import CASES, Case, Make
from presets import shapes

BATCHES = (64, 1, 8, 256)
COMPILED = ("prior L", "tokenizer v1")  # compiling takes seconds, so not every preset
BACKWARD_BATCHES = (64, 8)
COLUMNS = ("eager", "compiled", "library")
TINY: tuple[Shape, ...] = (
    DecoderShape(dim=64, heads=4, kv_heads=2, hidden_dim=96, vocab_size=128),
    DenoiserShape(dim=64, head_dim=32, condition_tokens=8, patches=16, patch_size=4,
                  codebook_size=64, code_dim=8),
)  # fmt: skip
NOTABLE = 1e-3  # relative difference of two implementations in fp32 that is no rounding
PATIENCE = 60  # seconds for one case, most of them torch.compile's


class Job(NamedTuple):
    op: str
    preset: str
    batch: int
    backward: bool

    def __str__(self) -> str:
        return f"{self.op}{' and backward' if self.backward else ''} | {self.preset} | {self.batch}"


def jobs() -> Iterator[Job]:
    """All of them: first the presets with every baseline, then the others, then the gradients."""
    every = shapes()
    ours = {op: [p for p, s in every.items() if isinstance(s, CASES[op][0])] for op in CASES}
    for backward, main in ((False, True), (True, True), (False, False), (True, False)):
        for batch in BACKWARD_BATCHES if backward else BATCHES:
            for op, presets in ours.items():
                for preset in presets:
                    if (preset in COMPILED) is main:
                        yield Job(op, preset, batch, backward)


def build(op: str, shape: Shape, batch: int, make: Make) -> Case:
    torch.manual_seed(0)
    return CASES[op][1](shape, batch, make)


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def with_backward(run: Callable[[], Any], leaves: list[Tensor]) -> Callable[[], list[Tensor]]:
    """`run` and the gradients of its inputs, for upstream gradients that are made once."""
    outputs = [y for y in tensors(run()) if y.requires_grad]
    torch.manual_seed(1)
    upstream = [torch.randn(y.shape, device=y.device).to(y.dtype) for y in outputs]

    def both() -> list[Tensor]:
        outputs = [y for y in tensors(run()) if y.requires_grad]
        return list(torch.autograd.grad(outputs, leaves, upstream, allow_unused=True))

    return both


def subjects(case: Case, compiled: bool) -> dict[str, Callable[[], Any]]:
    """What is timed of a case."""
    run = case.run
    eager, ours, *others = case.implementations
    runs: dict[str, Callable[[], Any]] = {"ours": partial(run, ours), "eager": partial(run, eager)}
    if compiled:
        runs["compiled"] = torch.compile(lambda: run(eager), dynamic=False)
    runs |= {name: partial(run, name) for name in others}
    if case.library is not None:
        runs["library"] = case.library[1]
    return runs


def measure(job: Job, ceilings: dict[str, float]) -> dict[str, Any]:
    """Seconds of each subject, or why there are none, and what ours achieves."""
    shape = shapes()[job.preset]
    make = Make("cuda", grad=job.backward)
    case = build(job.op, shape, job.batch, make)
    moved, flops = case.bytes, case.flops
    if job.backward and case.backward is not None:
        moved, flops = moved + case.backward[0], flops + case.backward[1]
    row: dict[str, Any] = {**job._asdict(), "shape": case.shape, "bytes": moved, "flops": flops}
    if case.library is not None:
        row["library"] = case.library[0]
    times: dict[str, float] = {}
    for name, run in subjects(case, job.preset in COMPILED).items():
        try:
            both = with_backward(run, make.leaves) if make.leaves else run
            times[name] = device_seconds(graphed(both))
        except Exception as error:  # of one subject, of any kind: the others go on
            row.setdefault("failed", {})[name] = explain(error)
            torch.cuda.synchronize()  # raises where the device is lost to this process
    torch._dynamo.reset()
    roof = max(moved / ceilings["copy"], flops / ceilings[str(case.precision)])
    row["seconds"] = times
    if "ours" in times:
        ours = times["ours"]
        row |= {"tb_s": moved / ours / 1e12, "tflop_s": flops / ours / 1e12, "of_roof": roof / ours}
        row["ratios"] = {name: t / ours for name, t in times.items() if name != "ours"}
    return row


def explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    ratios = row.get("ratios", {})
    cells = [row["op"] + (" and backward" if row["backward"] else ""), row["preset"], row["batch"]]
    cells.append(row["shape"])
    if "of_roof" in row:
        cells.append(f"{1e6 * row['seconds']['ours']:.1f}")
        cells += [f"{row['tb_s']:.2f}", f"{row['tflop_s']:.0f}", f"{100 * row['of_roof']:.0f}"]
    else:
        cells += ["failed", "", "", ""]
    for name in COLUMNS:
        missing = "failed" if name in row.get("failed", {}) else ""
        cells.append(f"{ratios[name]:.2f}" if name in ratios else missing)
    return "| " + " | ".join(map(str, cells)) + " |"


def table(document: dict[str, Any]) -> str:
    """The rows as Markdown; ratios are the other's time over ours."""
    ceilings = ", ".join(
        f"{name} {value / 1e12:.2f} {'TB/s' if name == 'copy' else 'TFLOP/s'}"
        for name, value in document["ceilings"].items()
    )
    libraries = {row["op"]: row["library"] for row in document["rows"] if "library" in row}
    others = {
        str(Job(*(row[field] for field in Job._fields))): ", ".join(
            f"{name} {ratio:.2f}" for name, ratio in row.get("ratios", {}).items()
            if name not in COLUMNS
        )
        for row in document["rows"]
    }  # fmt: skip
    lines = [
        f"# Kernels on {document['device']}", "",
        f"Ceilings measured here: {ceilings}. Commit {document['commit']}.", "",
        "| op | preset | batch | shape | µs | TB/s | TFLOP/s | % of roof | × eager | × compiled | "
        "× library |", "|---|---|---|---|---|---|---|---|---|---|---|",
        *(line(row) for row in document["rows"]), "",
        *(f"- library of {op}: {name}" for op, name in libraries.items()),
        *(f"- × others of {job}: {ratios}" for job, ratios in others.items() if ratios),
        f"- no time for {len(document['skipped'])} cases" if document["skipped"] else "",
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def check() -> list[dict[str, Any]]:
    """Everything once at a tiny size on the CPU; what differs between implementations."""
    rows = []
    for op, (kind, _) in CASES.items():
        shape = next(s for s in TINY if isinstance(s, kind))
        for backward in (False, True):
            results: dict[str, list[Tensor]] = {}
            names = build(op, shape, 1, Make("meta")).implementations
            for name in (*names, "library"):
                make = Make("cpu", dtype=torch.float32, grad=backward)
                case = build(op, shape, 1, make)  # anew: some ops write in place
                if (backward and case.backward is None) or (name == "library" and not case.library):
                    continue
                run = case.library[1] if name == "library" else partial(case.run, name)
                try:
                    if backward:
                        run = with_backward(run, make.leaves)
                    results[name] = [y.detach() for y in tensors(run()) if y is not None]
                except UnavailableError as error:
                    print(f"{op}: {error}")
            differ = {
                name: max(
                    float((y - x).norm() / x.norm())
                    if x.is_floating_point()
                    else float((x != y).float().mean())
                    for x, y in zip(results[names[0]], result, strict=True)
                )
                for name, result in results.items()
                if name in names[1:]
            }
            if results:
                rows.append({"op": op, "backward": backward, "ran": list(results)})
                rows[-1] |= {"differs": {n: d for n, d in differ.items() if not d < NOTABLE}}
                print(f"{op}{' and backward' if backward else ''} | {' '.join(results)} | {differ}")
    return rows


def ceilings_here() -> dict[str, float]:
    rates = {str(d): matrix_rate(d, "cuda", 8192) for d in (torch.bfloat16, torch.float32)}
    return {"copy": copy_bandwidth(), **rates}


def time_all(chosen: list[Job], seconds: float) -> dict[str, Any]:
    """Rows, the ceilings they are held to, and the cases that there was no time for.

    A process of its own does the work: one that hangs or loses the device is replaced.
    """
    start = time.perf_counter()
    new_worker = partial(get_context("spawn").Pool, 1)
    worker = new_worker()
    rows, skipped = [], []
    try:
        ceilings = worker.apply_async(ceilings_here).get(PATIENCE)
        print(" | ".join(f"{name} {value / 1e12:.2f} T/s" for name, value in ceilings.items()))
        for job in chosen:
            if time.perf_counter() - start > seconds:
                skipped.append(str(job))
                continue
            try:
                row = worker.apply_async(measure, (job, ceilings)).get(PATIENCE)
            except Exception as error:  # of memory, of the device, of patience: the next may do
                row = {**job._asdict(), "shape": "", "seconds": {}}
                row["failed"] = {"ours": explain(error)}
                worker.terminate()
                worker = new_worker()
            rows.append(row)
            print(line(row), *row.get("failed", {}).values(), flush=True)
    finally:
        worker.terminate()
    return {"ceilings": ceilings, "rows": rows, "skipped": skipped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", default="", help="only ops whose name has this in it")
    parser.add_argument("--preset", default="", help="only presets whose name has this in it")
    parser.add_argument("--batch", type=int, nargs="*", help=f"only these of {BATCHES}")
    parser.add_argument("--seconds", type=float, default=240, help="start no case after these")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--check", action="store_true", help="run each op once, tiny, on the CPU")
    parser.add_argument("--out", type=Path, help="write the JSON document here, a table beside it")
    args = parser.parse_args()
    every = shapes()
    chosen = []
    for job in jobs():
        if args.op in job.op and args.preset in job.preset and job.batch in (args.batch or BATCHES):
            case = build(job.op, every[job.preset], job.batch, Make("meta"))
            if case.backward is not None or not job.backward:
                chosen.append(job)
                if args.list:
                    print(f"{job} | {case.shape} | {case.bytes} bytes | {case.flops} FLOPs")
    document: dict[str, Any] = {"bench": "gpu_kernels", **about()}
    if args.list:
        document["cases"] = len(chosen)
    elif args.check:
        document["rows"] = check()
    else:
        if not torch.cuda.is_available():
            parser.error("expected a CUDA device (--list and --check need none)")
        document |= time_all(chosen, args.seconds)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(args.out.with_suffix(".md")) as temporary:
                temporary.write_text(table(document))
    finish(document, args.out)


if __name__ == "__main__":
    main()
