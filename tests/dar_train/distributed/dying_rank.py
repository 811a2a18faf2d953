"""A training whose last rank kills itself before its fourth step, in its first life only.

python -m torch.distributed.run … dying_rank.py recipe.json
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dar_train.loop import Loop
from dar_train.recipes import TokenizerRecipe
from dar_train.reporting import shown_logs
from dar_train.tokenizer_loop import train_tokenizer

DIES_AT = 3  # steps done

if __name__ == "__main__":
    values = json.loads(Path(sys.argv[1]).read_text())
    values |= {name: Path(values[name]) for name in ("data", "out")}
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    step = Loop.step

    def step_or_die(loop: Loop[Any]) -> Any:
        if first_life and last and loop.steps_done == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(loop)

    Loop.step = step_or_die  # type: ignore[method-assign]
    with shown_logs():
        train_tokenizer(TokenizerRecipe(**values))
