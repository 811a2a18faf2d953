"""The planned memory of an engine beside the peak of a real run, and the largest batch that fits.

The plan needs configurations alone and comes first. A run has a process of its own: on a CPU its
peak is the kernel's high-water mark over what the process had before the model; on a GPU it is
what torch's allocator gave out at most.
"""

import contextlib
import resource
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from dar_fast.bench.measure import about
from dar_fast.bench.models import Spec, make_subject, random_model
from dar_fast.bench.ours import AS_GIVEN, draw, start_engine
from dar_fast.bench.turns import Say
from dar_fast.config import PixelDiTConfig, PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer

Row = dict[str, Any]
STATUS = Path("/proc/self/status")
SMALL_PRIOR = PriorConfig(dim=32, depth=1, heads=2, vocab_size=64, num_tokens=8, num_classes=2)
SMALL_TOKENIZER = TokenizerConfig(
    image_size=16, patch_size=8, encoder_dim=32, encoder_depth=1, decoder_dim=32, decoder_depth=1,
    head_dim=16, codebook_size=64, num_tokens=8, num_groups=2, num_steps=2, query_table=8,
    dit=PixelDiTConfig(dim=32, depth=1, head_dim=16),
)  # fmt: skip
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Measured(NamedTuple):
    """Bytes of one run."""

    loaded: int  # with the model alone
    peak: int


def _resident() -> tuple[int, int]:
    """Bytes now, and at most since the last `_forget_peak`."""
    if STATUS.exists():
        lines = (line.split() for line in STATUS.read_text().splitlines())
        values = {words[0]: 1024 * int(words[1]) for words in lines if words[0].startswith("Vm")}
        return values["VmRSS:"], values["VmHWM:"]
    unit = 1 if sys.platform == "darwin" else 1024
    most = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most, most


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux: the peak is the process's
        Path("/proc/self/clear_refs").write_text("5")


def _draw_small(spec: Spec) -> None:
    """A picture of a small model: code and threads take their memory, which is not the plan's."""
    prior = random_model(Prior, SMALL_PRIOR, spec.number, spec.place)
    tokenizer = random_model(Tokenizer, SMALL_TOKENIZER, spec.number, spec.place)
    small = make_subject("small", prior, tokenizer)
    with start_engine(small, small.weights, max_requests=1) as engine:
        draw(engine, [0])


def run_once(spec: Spec, weights: str, batch: int) -> Measured:
    """Draw one batch in this process, which has done nothing else, and say what it took."""
    _draw_small(spec)
    start, _ = _resident()
    subject = spec.load()
    on_gpu = subject.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(subject.device)
        loaded = torch.cuda.memory_allocated(subject.device)
    else:
        loaded = _resident()[0] - start
        _forget_peak()
    with start_engine(subject, weights, max_requests=batch) as engine:
        draw(engine, subject.labels(batch))
    if on_gpu:
        return Measured(loaded, torch.cuda.max_memory_allocated(subject.device))
    return Measured(loaded, _resident()[1] - start)


def _in_a_process(spec: Spec, weights: str, batch: int) -> Measured:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_once, spec, weights, batch).result()


def memory(
    spec: Spec,
    *,
    quantised: Sequence[str],
    batches: Sequence[int],
    tried: Sequence[int],
    budget: int | None,
    plan_for: str | None,
    say: Say,
) -> dict[str, Any]:
    """The document of one run.

    Args:
        quantised: further kinds of prior weights: "int8", "fp8".
        batches: requests in flight to plan for.
        tried: those of them to measure.
        budget: bytes; None: what is free on the device.
        plan_for: a device type; where it is not the one here nothing is measured.
        say: told of every figure.
    """
    from dar_fast.engine.memory import available_memory
    from dar_fast.engine.plan import largest_batch, plan_memory
    from dar_fast.quantization import WeightForm

    prior, tokenizer = spec.configs()
    native = NAMES.get(spec.number, str(spec.number))
    here = spec.place.type
    kind_of_device = plan_for or here
    free = available_memory(spec.place)
    limit = free if budget is None else budget
    largest: dict[str, int] = {}
    rows: list[Row] = []
    for kind in (native, *quantised):
        for batch in batches:
            plan = plan_memory(
                prior, tokenizer, max_requests=batch, dtype=spec.number,
                weights_dtype=cast("WeightForm", AS_GIVEN if kind == native else kind),
                device_type=kind_of_device,
            )  # fmt: skip
            rows.append(
                {
                    "weights": kind, "batch": batch, "planned_bytes": plan.total,
                    "planned_loaded_bytes": plan.loaded, "parts": plan.parts(),
                    "measured_bytes": None, "measured_loaded_bytes": None,
                }
            )  # fmt: skip
        largest[kind] = largest_batch(plan, limit)
        say(f"largest batch in {limit / 1e9:.1f} GB: {kind}: {largest[kind]}")
    for row in rows:
        if row["batch"] not in tried:
            continue
        row.update(_measured(spec, row, free, kind_of_device == here))
        say(f"batch {row['batch']}, {row['weights']}: {row['measured_bytes'] or row['why_not']}")
    return {
        "bench": "memory", **about(spec.place), "model": spec.name, "planned_for": kind_of_device,
        "budget_bytes": limit, "available_bytes": free, "largest_batch": largest, "rows": rows,
    }  # fmt: skip


def _measured(spec: Spec, row: Row, free: int, same_device: bool) -> Row:
    """What a run took, or why there is none."""
    if not same_device:
        return {"why_not": "not run: planned for another device"}
    if row["planned_bytes"] > free:
        return {"why_not": f"not run: {free / 1e9:.1f} GB are free"}
    try:
        found = _in_a_process(spec, row["weights"], row["batch"])
    except BrokenProcessPool:
        return {"why_not": "its process was killed: out of memory"}
    except (RuntimeError, MemoryError, ValueError) as error:
        return {"why_not": f"{type(error).__name__}: {error}"}
    return {"measured_bytes": found.peak, "measured_loaded_bytes": found.loaded}


__all__ = ["Measured", "memory", "run_once"]
