"""Writes tokens in processes that kill themselves in the middle of a system call, until done.

python killed_writing.py FOLDER SEED: prints how many were killed.
"""

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_pictures import write

CALLS = ("pwrite", "fsync", "replace", "unlink")


def die_at(call: int, rng: random.Random) -> None:
    """From now on the `call`-th system call of interest ends the process, halfway through."""
    left = call

    def armed(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if real is os_pwrite:
                    handle, data, place = args
                    real(handle, data[: rng.randrange(len(data))], place)
                elif rng.random() < 0.5:
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapped

    os_pwrite = os.pwrite
    for name in CALLS:
        setattr(os, name, armed(getattr(os, name)))


def main() -> None:
    folder, rng = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    killed = 0
    while True:
        call, seed = rng.randint(1, 16), rng.random()
        child = os.fork()  # of a process that has run nothing yet: no threads
        if child == 0:
            die_at(call, random.Random(seed))
            os._exit(0 if write(folder) else 3)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        if not os.WIFSIGNALED(status):
            sys.exit(f"expected to be killed or done, got status {status}")
        killed += 1
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main()
