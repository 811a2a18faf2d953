"""Ours and the plain loop in turns, each in a process of its own; one document of both.

Images a second are a batch over the median step of all turns; the ratio is the median of each
turn's own, as a shared host is half as fast from one minute to the next. Utilisation is the FLOPs
that the mathematics needs (`flops`) over the seconds and the rate of a large bf16 product, the best
of probes between the turns.
"""

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dar_fast.bench.measure import Roofs, about
from dar_fast.bench.turns import Say, turns_within
from dar_fast.config import PRIORS, TOKENIZERS
from dar_train.bench.flops import prior_flops, tokenizer_flops
from dar_train.bench.subjects import Setting
from dar_train.bench.worker import Worker, WorkerError

WARM = 2  # steps that do not count: compilation, optimizer states, allocators


def _flops(setting: Setting) -> tuple[float, int]:
    """FLOPs, and tokens, of one picture."""
    if setting.model == "prior":
        prior = PRIORS[setting.preset]
        return prior_flops(prior), prior.num_tokens
    tokenizer = TOKENIZERS[setting.preset.removesuffix("-4096")]
    return tokenizer_flops(tokenizer), tokenizer.num_tokens


def measure(
    setting: Setting,
    *,
    turns: int,
    budget: float,
    with_plain: bool = True,
    trace: Path | None = None,
    say: Say,
) -> dict[str, Any]:
    """Time steps of both.

    Args:
        turns, budget: as `turns_within` has them.
        with_plain: also the plain loop; where it fails, for want of memory, its numbers are None.
        trace: write a profiler trace of one of our steps there.

    Raises:
        WorkerError: where our own run fails.
    """
    device = torch.device(setting.device)
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    roofs = Roofs(device, torch.bfloat16, {"memory": 2**26})
    kinds = ["ours", "plain"] if with_plain else ["ours"]
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for kind in kinds:
            say(f"{kind}: building and warming up")
            try:
                worker = stack.enter_context(Worker(kind, setting))  # type: ignore[arg-type]
                for _ in range(WARM):
                    worker.ask("warm")
            except WorkerError as error:
                if kind == "ours":
                    raise
                failed[kind] = str(error)
                continue
            workers[kind] = worker
        took: dict[str, list[float]] = {kind: [] for kind in workers}
        for turn in turns_within(turns, budget):
            roofs.probe()
            for kind, worker in workers.items():
                took[kind].append(worker.ask("step"))
                say(f"turn {turn} of {turns}: {kind}: {took[kind][-1]:.2f} s")
        memory = {kind: worker.ask("memory") for kind, worker in workers.items()}
        parts = workers["ours"].ask(f"parts {trace}" if trace else "parts")
    return _document(setting, took, memory, parts, roofs.rate, failed)


def _document(
    setting: Setting,
    took: dict[str, list[float]],
    memory: dict[str, Any],
    parts: dict[str, float],
    rate: float,
    failed: dict[str, str],
) -> dict[str, Any]:
    flops, tokens = _flops(setting)
    seconds = {kind: statistics.median(times) for kind, times in took.items()}
    images = {kind: setting.batch / took for kind, took in seconds.items()}
    ours, plain = images["ours"], images.get("plain")
    ratio = None
    if plain is not None:
        pairs = zip(took["plain"], took["ours"], strict=True)
        ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    mine, theirs = memory["ours"], memory.get("plain")
    return {
        "bench": "train", setting.model: setting.preset,
        "images_per_second": ours,
        "plain_images_per_second": plain,
        "ratio": ratio,
        "peak_bytes": mine.peak,
        "plain_peak_bytes": None if theirs is None else theirs.peak,
        "peak_ratio": None if theirs is None else mine.peak / theirs.peak,
        "mfu": flops * ours / rate,
        "plain_mfu": None if plain is None else flops * plain / rate,
        "tokens_per_second": ours * tokens,
        "batch": setting.batch, "micro_batch": setting.micro_batch,
        "compile": setting.compile, "attention": setting.attention,
        "recompute": setting.recompute,
        "flops_per_image": flops, "flops_per_second_of_a_product": rate,
        "seconds": {kind: [round(s, 4) for s in times] for kind, times in took.items()},
        "seconds_by_part": parts,
        "memory": {kind: part._asdict() for kind, part in memory.items()},
        "failed": failed,
        **about(torch.device(setting.device)),
    }  # fmt: skip


def lines_of(document: dict[str, Any]) -> list[str]:
    """What a person reads."""
    name = document.get("prior") or document.get("tokenizer")
    what = "prior" if "prior" in document else "tokenizer"

    def number(value: float | None, form: str = ".2f") -> str:
        return "not measured" if value is None else format(value, form)

    gb = {k: None if document[k] is None else document[k] / 1e9 for k in (
        "peak_bytes", "plain_peak_bytes")}  # fmt: skip
    parts = ", ".join(f"{part} {s:.3f} s" for part, s in document["seconds_by_part"].items())
    kinds = ("weights", "gradients", "optimizer", "average")
    held = ", ".join(f"{k} {document['memory']['ours'][k] / 1e9:.2f} GB" for k in kinds)
    return [
        f"training {what} {name}, batch {document['batch']} in micro-batches of "
        f"{document['micro_batch'] or document['batch']}, {document['device']}",
        f"images a second: {number(document['images_per_second'])}, plain eager loop "
        f"{number(document['plain_images_per_second'])}: {number(document['ratio'])}x",
        f"peak memory: {number(gb['peak_bytes'])} GB, plain {number(gb['plain_peak_bytes'])} GB: "
        f"{number(document['peak_ratio'])}x",
        f"of the rate of a large bf16 product, "
        f"{document['flops_per_second_of_a_product'] / 1e12:.3f} TFLOP/s: "
        f"{document['mfu']:.0%}, plain {number(document['plain_mfu'], '.0%')}",
        f"a step by part: {parts}",
        f"memory by part: {held}",
    ]
