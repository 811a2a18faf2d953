"""`dar`: the command line. One typed function a command; torch waits until a command needs it."""

import importlib
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import dar_fast
from dar_fast.cli.errors import status_of
from dar_fast.cli.parse import run_command

COMMANDS: dict[str, tuple[str, str]] = {  # name: where its function is, what it does
    "sample": ("generate", "draw pictures of labels: a contact sheet, or a folder of pictures"),
    "preview": ("generate", "watch one picture come: a strip of its previews and an animation"),
    "restyle": (
        "restyle",
        "keep a picture's first groups of codes, redraw the rest as other labels",
    ),
    "reconstruct": ("pictures", "pictures beside what their codes decode to, with PSNR"),
    "encode": ("codes", "pictures to a packed code file"),
    "decode": ("codes", "a packed code file to pictures, whole or its first groups only"),
    "labels": ("models", "the label names of a model"),
    "info": ("models", "what a model folder, an official .pt file or a sampled .png holds"),
    "convert": ("models", "official checkpoints to our folders, and back"),
    "doctor": ("models", "versions, device, and which implementation every op will use"),
}
BENCH = "what the engine takes: latency, throughput, memory, beside the floor"
TRAIN = "train the tokenizer or the prior (needs the extra: dar-fast[train])"
TOKENIZE = "a data set to a folder of codes, for training the prior (needs the same extra)"


def usage() -> str:
    """The text of `dar --help`."""
    summaries = {name: summary for name, (_, summary) in COMMANDS.items()}
    summaries |= {"bench": BENCH, "tokenize": TOKENIZE, "train": TRAIN}
    rows = "\n".join(f"  {name:<13}{summary}" for name, summary in summaries.items())
    return (
        "usage: dar COMMAND [options]\n\n"
        "Label in, picture out, with a preview after every group of codes (arXiv 2505.23660).\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help   this text; dar COMMAND --help for a command's own\n"
        "  --version    the version\n"
        "  --debug      anywhere: show the traceback of an error\n"
    )


def load_command(name: str) -> Callable[..., None]:
    """The function of a command.

    Raises:
        ValueError: where there is no such command.
    """
    if name not in COMMANDS:
        known = [*COMMANDS, "bench", "tokenize", "train"]
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f" of {', '.join(known)}"
        raise ValueError(f"expected a command, got {name!r}{hint}")
    module = importlib.import_module(f"dar_fast.cli.{COMMANDS[name][0]}")
    command: Callable[..., None] = getattr(module, name)
    return command


def run(argv: Sequence[str]) -> None:
    """Run one command line; errors come out as they are."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        if not argv:
            raise ValueError("expected a command, got none; dar sample is a good start")
    elif argv[0] in ("-V", "--version"):
        sys.stdout.write(f"dar {dar_fast.__version__}\n")
    elif argv[0] == "bench":
        from dar_fast.cli.bench import bench

        bench(argv[1:])
    elif argv[0] in ("train", "tokenize"):
        from dar_fast.cli import train

        (train.train if argv[0] == "train" else train.tokenize)(argv[1:])
    else:
        run_command(load_command(argv[0]), argv[1:], f"dar {argv[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dar` with `argv` (by default the process's) and return the exit status."""
    return status_of(run, argv)


__all__ = ["main"]
