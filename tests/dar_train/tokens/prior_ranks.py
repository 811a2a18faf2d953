"""One rank of a prior's training, for torch.multiprocessing."""

import os

from dar_train.prior_loop import train_prior
from dar_train.recipes import PriorRecipe


def one_rank(rank: int, world: int, port: int, recipe: PriorRecipe) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if not train_prior(recipe):
        raise RuntimeError(f"rank {rank}: the run is not over")
