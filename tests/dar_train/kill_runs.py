"""A training for a process that gets killed, at a moment of its own choice while saving."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from dar_train.checkpoints import Checkpoints
from dar_train.distributed import Ranks
from dar_train.recipes import TokenizerRecipe
from dar_train.tokenizer_loop import tokenizer_loop

STOPPED = 3  # exit status of a run that was asked to stop


class Moments:
    """Counts calls and returns, Python's and C's, and kills the process at a chosen one."""

    def __init__(self, fatal: int | None = None) -> None:
        self.count = 0
        self.fatal = fatal

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        self.count += 1
        if self.count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def watch_saves(moments: Moments, save: int) -> None:
    """Let `moments` see the `save`-th writing of this process, 1-based, in whatever thread."""
    write, seen = Checkpoints._write, [0]

    def watched(self: Checkpoints, *arguments: object) -> None:
        seen[0] += 1
        if seen[0] != save:
            return write(self, *arguments)
        sys.setprofile(moments)
        try:
            write(self, *arguments)
        finally:
            sys.setprofile(None)

    Checkpoints._write = watched


def train(recipe: TokenizerRecipe, save: int, fatal: int | None, count_file: Path | None) -> None:
    """Train on to the end, or be killed at moment `fatal` of save `save`."""
    torch.set_num_threads(1)
    moments = Moments(fatal)
    watch_saves(moments, save)
    over = tokenizer_loop(recipe, Ranks(0, 1, 0, torch.device("cpu"))).run()
    if count_file is not None:
        count_file.write_text(str(moments.count))
    if not over:
        raise SystemExit(STOPPED)
