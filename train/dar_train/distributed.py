"""Who takes part in a run: ranks as torchrun names them, one where nobody did.

Messages go by NCCL between GPUs and by gloo between CPUs. A rank that dies ends the others at once
where gloo notices the closed connection, else when their message is older than the timeout.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from dar_fast.device import pick_device

SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
AUTO = "auto"  # the device that a recipe leaves open
TIMEOUT_MINUTES = 30.0  # longer than the first rank's evaluation, which the others wait for


class RanksError(RuntimeError):
    """The ranks of a run lost one another."""


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
        ValueError: where they are no integers, or do not fit one another or the GPUs.
    """
    values = {}
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)):
        text = os.environ.get(name, str(default))
        if not text.isdecimal():
            raise ValueError(f"{name}: expected an integer >= 0, got {text!r}")
        values[name] = int(text)
    rank, world, local = values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"]
    if not 0 <= rank < world:
        raise ValueError(f"RANK: expected one below WORLD_SIZE {world}, got {rank}")
    if device.type == "cuda" and world > 1:
        if device.index is not None:
            raise ValueError(f"device: expected cuda, as each rank has its own, got {device}")
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK: expected one of {torch.cuda.device_count()} GPUs, got {local}"
            )
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local)
    return Ranks(rank, world, local, device)


def join(device: str = AUTO, timeout_minutes: float = TIMEOUT_MINUTES) -> Ranks:
    """Meet the other ranks, where there are any; `leave` when done, or use `joined`.

    `device` is a recipe's: auto, cpu, cuda or cuda:<n>. It waits for the others at most
    `timeout_minutes`, here and in each later message.

    Raises:
        ValueError: where the device, the environment or the timeout does not fit.
        RanksError: where the others do not come.
    """
    if not timeout_minutes > 0:
        raise ValueError(f"timeout_minutes: expected a positive number, got {timeout_minutes}")
    ranks = ranks_of_environment(pick_device(None if device == AUTO else device))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.world == 1:
        return ranks
    if dist.is_initialized():  # by a launcher such as Ray Train
        if (dist.get_rank(), dist.get_world_size()) != ranks[:2]:
            raise ValueError(
                f"RANK, WORLD_SIZE: expected {dist.get_rank()} and {dist.get_world_size()}, as the "
                f"ranks have met, got {ranks.rank} and {ranks.world}"
            )
        return ranks
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    ):
        # seen with PyTorch 2.13: ranks of a second life read the first one's addresses there
        raise ValueError(
            f"torchrun: expected {SHARED_STORE}=1 in its environment with --max-restarts, else "
            "ranks that start again look for the dead ones"
        )
    gpu = ranks.device.type == "cuda"
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            timeout=timedelta(minutes=timeout_minutes),
            device_id=ranks.device if gpu else None,
        )
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RanksError(
            f"rank {ranks.rank} of {ranks.world}: expected the others at {where} within "
            f"{timeout_minutes:g} minutes, got {_first_line(error)}"
        ) from error
    return ranks


def leave() -> None:
    """Part from the other ranks; nothing where there are none."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def joined(device: str = AUTO, timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Ranks]:
    """`join`, and `leave` in any case: a rank that fails closes its connections.

    Ranks that a launcher has made meet are left as they are.

    Raises:
        RanksError: where another rank dies, or does not answer within the timeout.
    """
    met = dist.is_initialized()
    ranks = join(device, timeout_minutes)
    try:
        yield ranks
    except RuntimeError as error:
        if not lost_rank(error):
            raise
        raise RanksError(
            f"rank {ranks.rank} of {ranks.world}: another rank died or did not answer within "
            f"{timeout_minutes:g} minutes ({_first_line(error)}); its own messages say why"
        ) from error
    finally:
        if not met:
            leave()


def lost_rank(error: BaseException) -> bool:
    """Whether `error` is that of a message which did not arrive."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's errors have no type of their own
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "Connection closed by peer", "Timed out waiting")
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


__all__ = [
    "AUTO", "TIMEOUT_MINUTES", "Ranks", "RanksError", "join", "joined", "leave", "lost_rank",
    "ranks_of_environment",
]  # fmt: skip
