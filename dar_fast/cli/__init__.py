"""`dar`: the command line. One typed function a command; torch waits until a command needs it.

Exit status: 0 done, 2 bad usage (ValueError, TypeError), 130 interrupted, 1 for the rest. An error
is one line on stderr; `--debug`, anywhere, adds the traceback.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches

import dar_fast
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
MAX_MESSAGE = 600  # characters of an error line


def usage() -> str:
    """The text of `dar --help`."""
    summaries = {name: summary for name, (_, summary) in COMMANDS.items()}
    summaries |= {"bench": BENCH, "train": TRAIN}
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
        known = [*COMMANDS, "bench", "train"]
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
    elif argv[0] == "train":
        from dar_fast.cli.train import train

        train(argv[1:])
    else:
        run_command(load_command(argv[0]), argv[1:], f"dar {argv[0]}")


def message(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, OSError | ValueError | TypeError | RuntimeError):
        text = str(error) or type(error).__name__
    else:
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def exit_status(error: BaseException) -> int:
    """The exit status that an error stands for."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | TypeError) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dar` with `argv` (by default the process's) and return the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]
    arguments = [a for a in arguments[:end] if a != "--debug"] + arguments[end:]
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` for one, has enough; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as leaving:  # help was asked for and shown
        return leaving.code if isinstance(leaving.code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else message(error)
        sys.stderr.write(f"dar: error: {text}\n")
        return exit_status(error)
    return 0


__all__ = ["main"]
