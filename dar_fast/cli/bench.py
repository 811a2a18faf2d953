"""`dar bench latency|throughput|memory|quality|train`: what is taken beside what must be.

The last line on stdout is one JSON document, with --json the only one; progress is on stderr.
"""

import json as encoder
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from dar_fast.cli.bench_quality import quality
from dar_fast.cli.options import check_device, torch_dtype
from dar_fast.cli.parse import run_command
from dar_fast.cli.report import notice, say, working
from dar_fast.cli.save import check_output, save_bytes
from dar_fast.cli.train import run_extra

if TYPE_CHECKING:
    from dar_fast.bench.models import Spec, Subject

Json = Annotated[bool, arg(help_behavior_hint="")]
Output = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Quantised = Literal["int8", "fp8"]
BENCHES = {
    "latency": "one picture: seconds, first preview, codes alone, pixel DiT alone",
    "throughput": "pictures a second over batch sizes, and latency under load",
    "memory": "the plan beside a measured peak, and the largest batch that fits",
    "quality": "what int8 and fp8 prior weights change: next codes, greedy codes, pictures",
    "train": "a training step: images a second, memory, utilisation (needs the extra: train)",
}
# most turns, and seconds that they may take: on two cores a turn of prior L and tokenizer v1 takes
# one minute, of the embedded model a few seconds
QUICK_TURNS, TURNS = 5, 10
QUICK_SECONDS, SECONDS = 200.0, 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubjectOptions:
    """What is timed, and where."""

    model: Annotated[str, arg(metavar="demo|PATH")] = "demo"
    """The embedded model, or a folder that `save_pretrained` or `dar convert` wrote."""
    prior: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A preset such as L or XL instead, with --tokenizer and --random-weights."""
    tokenizer: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """A preset such as v1."""
    random_weights: Annotated[bool, arg(help_behavior_hint="")] = False
    """Seeded random weights, which serve for speed."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: a GPU if there is one)")
    ] = None
    """cpu, cuda, cuda:1, …"""
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        arg(
            metavar="DTYPE",
            help_behavior_hint="(default: bfloat16; of a model on the CPU float32)",
        ),
    ] = None
    """Type of the weights as given."""

    def check(self) -> None:
        """Raise ValueError where the options do not say which model."""
        presets = self.prior is not None, self.tokenizer is not None, self.random_weights
        if any(presets) and not all(presets):
            raise ValueError(
                "random-weights: expected --prior NAME, --tokenizer NAME and --random-weights "
                "together, got some of them; folders go to --model"
            )
        if all(presets) and self.model != "demo":
            raise ValueError(f"model: expected none beside --random-weights, got {self.model!r}")

    def spec(self) -> "Spec":
        """The model by name.

        Raises:
            ValueError: where the options do not say which, or the device or the dtype is none.
        """
        self.check()
        device, dtype = check_device(self.device), torch_dtype(self.dtype)
        from dar_fast.bench.models import Spec

        return Spec(
            model=self.model, prior=self.prior, tokenizer=self.tokenizer, device=device,
            dtype=dtype,
        )  # fmt: skip

    def load(self) -> "Subject":
        """The model.

        Raises:
            ValueError: where a name, the device or the dtype is none.
            CheckpointError: where the folder cannot be read.
        """
        spec = self.spec()
        with working(f"loading {spec.name}"):
            return spec.load()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultOptions:
    """Where the result goes, and how long it may take."""

    quick: Annotated[bool, arg(help_behavior_hint="")] = False
    """Fewer turns."""
    json: Json = False
    """Print the JSON document alone, on one line."""
    out: Output = None
    """Write the JSON document there too."""
    plot: Output = None
    """Draw the result beside its roof: a .png file (needs matplotlib)."""

    def check(self) -> None:
        """Raise where a file cannot be written, before any work."""
        if self.out is not None:
            check_output("out", self.out, ".json")
        if self.plot is not None:
            check_output("plot", self.plot, ".png")
            from dar_fast.bench.plot import check_matplotlib

            check_matplotlib()

    @property
    def turns(self) -> dict[str, Any]:
        """Most turns, and seconds for them."""
        if self.quick:
            return {"turns": QUICK_TURNS, "budget": QUICK_SECONDS}
        return {"turns": TURNS, "budget": SECONDS}

    def finish(self, document: dict[str, Any], lines: Sequence[str]) -> None:
        """Print and write what was measured."""
        document = {**document, "quick": self.quick}
        if self.out is not None:
            save_bytes(self.out, (encoder.dumps(document, indent=1) + "\n").encode())
        if self.plot is not None:
            from dar_fast.bench.plot import save_plot

            save_plot(document, self.plot)
        if not self.json:
            for line in lines:
                say(line)
        say(encoder.dumps(document))


SUBJECT, RESULT = SubjectOptions(), ResultOptions()


def latency(
    *,
    subject: OmitArgPrefixes[SubjectOptions] = SUBJECT,
    quantised: Annotated[tuple[Quantised, ...], arg(metavar="int8|fp8 ...")] = ("int8",),
    result: OmitArgPrefixes[ResultOptions] = RESULT,
) -> None:
    """Time one guided picture through the engine beside its floor and the plain path.

    Args:
        quantised: Kinds of prior weights beside those given.
    """
    result.check()
    model = subject.load()
    from dar_fast.bench.latency import latency as measure
    from dar_fast.bench.report import latency_lines

    document = measure(model, quantised=quantised, say=notice, **result.turns)
    result.finish(document, latency_lines(document))


def throughput(
    *,
    subject: OmitArgPrefixes[SubjectOptions] = SUBJECT,
    requests: Annotated[int, arg(metavar="N")] = 16,
    batch_sizes: Annotated[tuple[int, ...], arg(metavar="B ...")] = (1, 4, 16),
    quantised: Annotated[
        tuple[Quantised, ...], arg(metavar="int8|fp8 ...", help_behavior_hint="")
    ] = (),
    rate: Annotated[
        float | None,
        arg(metavar="R", help_behavior_hint="(default: 0.7 of the best throughput)"),
    ] = None,
    arrivals: Annotated[
        int | None, arg(metavar="N", help_behavior_hint="(default: 200; with --quick 40)")
    ] = None,
    result: OmitArgPrefixes[ResultOptions] = RESULT,
) -> None:
    """Time many requests: pictures a second over batch sizes, then latency under load.

    Args:
        requests: Pictures that are asked for at once.
        batch_sizes: Requests that the engine holds at once.
        quantised: Kinds of prior weights beside those given.
        rate: Requests a second that arrive at the queue, a Poisson process.
        arrivals: Requests of the queue.
    """
    for name, values in (("requests", (requests,)), ("batch-sizes", batch_sizes)):
        if not values or min(values) < 1:
            raise ValueError(f"{name}: expected integers >= 1, got {list(values)}")
    if rate is not None and not 0 < rate < float("inf"):
        raise ValueError(f"rate: expected a number > 0, got {rate}")
    if arrivals is not None and arrivals < 1:
        raise ValueError(f"arrivals: expected an integer >= 1, got {arrivals}")
    result.check()
    model = subject.load()
    from dar_fast.bench.report import throughput_lines
    from dar_fast.bench.throughput import throughput as measure

    document = measure(
        model, quantised=quantised, requests=requests, batches=sorted(set(batch_sizes)), rate=rate,
        arrivals=arrivals or (40 if result.quick else 200), say=notice, **result.turns,
    )  # fmt: skip
    result.finish(document, throughput_lines(document))


def memory(
    *,
    subject: OmitArgPrefixes[SubjectOptions] = SUBJECT,
    budget_gb: Annotated[
        float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")
    ] = None,
    batch_sizes: Annotated[tuple[int, ...], arg(metavar="B ...")] = (1, 4),
    quantised: Annotated[tuple[Quantised, ...], arg(metavar="int8|fp8 ...")] = ("int8",),
    plan_for: Annotated[
        Literal["cpu", "cuda"] | None,
        arg(metavar="cpu|cuda", help_behavior_hint="(default: the device)"),
    ] = None,
    result: OmitArgPrefixes[ResultOptions] = RESULT,
) -> None:
    """Plan the memory of an engine, say the largest batch that fits, then measure real runs.

    Args:
        budget_gb: Memory to fit into, in 10^9 bytes.
        batch_sizes: Requests that the engine holds at once; with --quick the smallest only is run.
        quantised: Kinds of prior weights beside those given.
        plan_for: Plan for this kind of device; where it is not the one here, nothing is run.
    """
    if budget_gb is not None and not 0 < budget_gb < float("inf"):
        raise ValueError(f"budget-gb: expected a number > 0, got {budget_gb:g}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch-sizes: expected integers >= 1, got {list(batch_sizes)}")
    result.check()
    spec = subject.spec()
    from dar_fast.bench.memory import memory as measure
    from dar_fast.bench.report import memory_lines

    batches = sorted(set(batch_sizes))
    document = measure(
        spec, quantised=quantised, batches=batches, tried=batches[:1] if result.quick else batches,
        budget=None if budget_gb is None else int(budget_gb * 1e9), plan_for=plan_for, say=notice,
    )  # fmt: skip
    result.finish(document, memory_lines(document))


COMMANDS: dict[str, Callable[..., None]] = {
    "latency": latency,
    "throughput": throughput,
    "memory": memory,
    "quality": quality,
}


def usage() -> str:
    """The text of `dar bench --help`."""
    rows = "\n".join(f"  {name:<13}{summary}" for name, summary in BENCHES.items())
    return (
        "usage: dar bench BENCH [options]\n\n"
        "What the engine takes, beside its floor and the plain path.\n\n"
        f"benches:\n{rows}\n\n"
        "options:\n  -h, --help   this text; dar bench BENCH --help for a bench's own\n"
    )


def bench(argv: Sequence[str]) -> None:
    """Run `dar bench` with what follows it; errors come out as they are.

    Raises:
        ValueError: where there is no such bench.
    """
    if argv and argv[0] in ("-h", "--help"):
        say(usage().rstrip())
        return
    if argv and argv[0] == "train":
        run_extra("bench train", "dar_train.bench.command", argv[1:])
        return
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "none"
        raise ValueError(f"bench: expected one of {', '.join(BENCHES)}, got {got}")
    run_command(COMMANDS[argv[0]], argv[1:], f"dar bench {argv[0]}")


__all__ = ["bench"]
