"""Who takes part in a run: ranks as torchrun names them, one where nobody did."""

import os
from typing import NamedTuple

import torch


class Ranks(NamedTuple):
    """This process among those of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0


def ranks_of_environment(device: torch.device) -> Ranks:
    """This process by RANK, WORLD_SIZE and LOCAL_RANK; alone where they are not set.

    Raises:
        ValueError: where they are no integers, or do not fit one another.
    """
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise ValueError(f"{name}: expected an integer >= 0, got {text!r}")
        values[name] = int(text)
    rank, world = values["RANK"], values["WORLD_SIZE"]
    if not 0 <= rank < world:
        raise ValueError(f"RANK: expected one below WORLD_SIZE {world}, got {rank}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", values["LOCAL_RANK"])
    return Ranks(rank, world, values["LOCAL_RANK"], device)
