"""`dar bench train`: what a training step takes, beside the plain eager loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from dar_fast.cli.bench import RESULT, ResultOptions
from dar_fast.cli.options import check_device
from dar_fast.cli.parse import run_command
from dar_fast.cli.report import notice
from dar_fast.device import pick_device
from dar_kernels import prefer

# on two cores a step takes seconds, on a GPU under one
BATCHES = {("prior", "cpu"): 16, ("tokenizer", "cpu"): 4, ("prior", "cuda"): 64,
           ("tokenizer", "cuda"): 32}  # fmt: skip
MICRO = {("prior", "cpu"): 8, ("tokenizer", "cpu"): 2}
QUICK_TURNS, TURNS = 5, 10
QUICK_SECONDS, SECONDS = 150.0, 900.0


def train(
    *,
    prior: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    tokenizer: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    batch: Annotated[
        int | None, arg(metavar="B", help_behavior_hint="(default: by device)")
    ] = None,
    micro_batch: Annotated[
        int | None, arg(metavar="B", help_behavior_hint="(default: by device)")
    ] = None,
    eager: Annotated[bool, arg(help_behavior_hint="")] = False,
    attention: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    recompute: Literal["none", "selective", "full"] = "none",
    alone: Annotated[bool, arg(help_behavior_hint="")] = False,
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")
    ] = None,
    threads: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None,
    trace: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None,
    result: OmitArgPrefixes[ResultOptions] = RESULT,
) -> None:
    """Time steps of a training run beside a plain eager loop, in turns, each in its own process.

    Args:
        prior: A preset of the prior to train: B, L, XL, ...
        tokenizer: A preset of the tokenizer to train instead: v1 or lite.
        batch: Pictures an optimizer step, of both.
        micro_batch: Pictures a pass of ours; the plain loop takes the batch in one.
        eager: No torch.compile on our blocks.
        attention: Back end of our attention by name (dar doctor).
        recompute: Activations that our backward pass makes again.
        alone: Leave the plain loop out.
        device: cpu, cuda, cuda:1, ...
        threads: CPU threads of both.
        trace: Write a profiler trace of one of our steps: a .json file for chrome://tracing.
    """
    from dar_train.recipes import PRIOR_RECIPES, TOKENIZER_RECIPES
    from dar_train.recipes.checks import of_known

    if (prior is None) == (tokenizer is None):
        raise ValueError("prior, tokenizer: expected one of them, got both or neither")
    if result.plot is not None:
        raise ValueError("plot: expected none for this bench, got a file")
    result.check()
    where = check_device(device) or pick_device(None).type
    kind = where.partition(":")[0]
    model: Literal["prior", "tokenizer"] = "prior" if prior is not None else "tokenizer"
    preset = prior or tokenizer or ""
    known = PRIOR_RECIPES if model == "prior" else TOKENIZER_RECIPES
    if preset not in known:
        raise ValueError(of_known(model, preset, known))
    size = batch or BATCHES[model, kind]
    micro = micro_batch or (min(MICRO[model, kind], size) if (model, kind) in MICRO else None)
    if size < 1 or (micro is not None and not 0 < micro <= size):
        raise ValueError(f"micro-batch: expected 1 to the batch of {size}, got {micro}")
    if attention is not None:
        with prefer(attention, op="attention"):
            pass  # it is there
    from dar_train.bench.measure import lines_of, measure
    from dar_train.bench.subjects import Setting

    setting = Setting(
        model=model, preset=preset, device=where, batch=size, micro_batch=micro,
        compile=not eager,
        attention=attention, recompute=recompute, threads=threads,
    )  # fmt: skip
    document = measure(
        setting, with_plain=not alone, trace=trace, say=notice,
        turns=QUICK_TURNS if result.quick else TURNS,
        budget=QUICK_SECONDS if result.quick else SECONDS,
    )  # fmt: skip
    result.finish(document, lines_of(document))


def run(argv: Sequence[str]) -> None:
    """Run `dar bench train` with what follows it; errors come out as they are."""
    run_command(train, argv, "dar bench train")
