"""From an error to what a command line says of it, and to its exit status.

0 done, 2 bad usage (ValueError, TypeError), 130 interrupted, 1 for the rest. An error is one line
on stderr, or a line for each problem of an input; `--debug`, anywhere, adds the traceback.
"""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from dar_fast.problems import ProblemsError

MAX_MESSAGE = 600  # characters of an error line


def message(error: BaseException) -> str:
    """One line that says what went wrong, or one for each problem."""
    if isinstance(error, ProblemsError) and len(error.problems) > 1:
        lines = (f"\n  {_line(problem)}" for problem in error.problems)
        return f"{len(error.problems)} problems:{''.join(lines)}"
    if isinstance(error, OSError) and error.strerror:
        return _line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, OSError | ValueError | TypeError | RuntimeError):
        return _line(str(error) or type(error).__name__)
    return _line(f"{type(error).__name__}: {error}")


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"


def exit_status(error: BaseException) -> int:
    """The exit status that an error stands for."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | TypeError) else 1


def status_of(
    run: Callable[[list[str]], object], argv: Sequence[str] | None = None, program: str = "dar"
) -> int:
    """Call `run` with `argv`, by default the process's, and return the exit status."""
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
        sys.stderr.write(f"{program}: error: {text}\n")
        return exit_status(error)
    return 0
