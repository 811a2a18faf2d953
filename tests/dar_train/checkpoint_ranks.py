"""What the ranks of a run do with states, each in a process of its own."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dar_train.checkpoints import CheckpointError, Checkpoints, TrainState, shards
from dar_train.distributed import Ranks


def in_group(work: Callable[..., None], rank: int, world: int, meeting: Path, *args: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
        )
    try:
        work(Ranks(rank, world, rank, torch.device("cpu")), *args)
    finally:
        if world > 1:
            dist.destroy_process_group()


class Odd(nn.Module):
    """Shapes that no number of ranks divides, one row among them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5, bias=False)])
        self.rows = nn.Parameter(torch.randn(3, 5))
        self.row = nn.Parameter(torch.randn(1, 5))
        self.register_buffer("codes", torch.arange(7, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return (x @ self.rows.t()).square().mean() + (x * self.row).square().mean()


def make(ranks: Ranks, kind: str, seed: int) -> TrainState:
    torch.manual_seed(seed)
    model, averaged = Odd(), Odd()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (ranks.world,))
        for module in (model, averaged):
            for block in module.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
    used = DistributedDataParallel(model) if kind == "ddp" else model
    plain = [p for name, p in model.named_parameters() if "blocks" not in name]
    optimizers = [
        torch.optim.AdamW(model.blocks.parameters(), lr=0.01, fused=True),
        torch.optim.SGD(plain, lr=0.01, momentum=0.9),
    ]
    return TrainState(used, averaged, optimizers, {"idle": torch.full((4,), seed)})


def step(state: TrainState) -> None:
    torch.manual_seed(5)
    state.model(torch.randn(4, 5)).backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()


def whole(state: TrainState) -> dict[str, Tensor]:
    """Everything unsharded, by names that do not depend on the code under test."""
    model = state.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    found = {f"extra {name}": tensor for name, tensor in state.extra.items()}
    for part, module in (("model", model), ("averaged", state.averaged)):
        found |= {f"{part} {name}": value for name, value in module.state_dict().items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, values in optimizer.state.items():
            found |= {f"{names[id(parameter)]} {key}": value for key, value in values.items()}
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in found.items()
    }


def save(ranks: Ranks, kind: str, folder: Path, asynchronous: bool) -> None:
    state = make(ranks, kind, 0)
    step(state)
    kept = Checkpoints(folder, ranks, asynchronous=asynchronous)
    kept.save(1, state, {"ranks": ranks.world})
    step(state)
    with torch.no_grad():
        state.model(torch.ones(2, 5))  # after which FSDP2 holds its root's weights whole
    path = kept.save(2, state, {"ranks": ranks.world})
    kept.wait()
    truth = whole(state)
    assert kept.last == path
    step(state)
    after = whole(state)
    if ranks.first:
        save_file(truth, folder.parent / "truth.safetensors")
        save_file(after, folder.parent / "after.safetensors")


def load(ranks: Ranks, kind: str, folder: Path, saved_by: int) -> None:
    state = make(ranks, kind, 3)
    kept = Checkpoints(folder, ranks)
    record = kept.load(kept.find(), state)
    assert record["ranks"] == saved_by
    found, truth = whole(state), load_file(folder.parent / "truth.safetensors")
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor), name
    kept.save(record["step"] + 1, state, {"ranks": ranks.world})  # for others
    step(state)
    after = load_file(folder.parent / "after.safetensors")
    for name, tensor in whole(state).items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6)


def _complaint(work: Callable[[], object], kind: type[Exception]) -> str:
    try:
        work()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind}")


def fail(ranks: Ranks, folder: Path, asynchronous: bool) -> None:
    """The second rank's disk is full."""
    state = make(ranks, "ddp", 0)
    kept = Checkpoints(folder, ranks, asynchronous=asynchronous)
    kept.save(1, state, {})
    kept.wait()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    real = shards.save_file
    if ranks.rank == 1:
        shards.save_file = full
    said = _complaint(lambda: (kept.save(2, state, {}), kept.wait()), CheckpointError)
    assert "step 2 was not saved: rank 1: [Errno 28] No space" in said, said
    assert "step-00000001" in said
    shards.save_file = real
    dist.barrier()
    assert not list(folder.glob(".step-*"))
    assert kept.find() == folder / "step-00000001"
    kept.save(3, state, {})
    kept.wait()
    assert kept.find() == folder / "step-00000003"


def disagree(ranks: Ranks, folder: Path) -> None:
    """One rank's model is another; then a file is damaged."""
    state = make(ranks, "plain", 0)
    kept = Checkpoints(folder, ranks)
    kept.save(1, state, {})
    kept.save(2, state, {})
    other = make(ranks, "plain", 1)
    if ranks.rank == 1:
        other = other._replace(averaged=nn.Linear(2, 2))
    said = _complaint(lambda: kept.load(kept.last, other), ValueError)
    assert said.startswith("rank 1: checkpoint: expected averaged/weight"), said
    if ranks.first:
        file = next((folder / "step-00000002").glob("model.*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    dist.barrier()
    logging.disable()
    assert kept.find() == folder / "step-00000001"
    if ranks.first:
        (folder / "step-00000001" / "state.json").unlink()
    dist.barrier()
    said = _complaint(kept.find, ValueError)
    assert "step-00000001" in said and "step-00000002" in said


def die(ranks: Ranks, folder: Path) -> None:
    """The second rank is gone when the first one saves."""
    state = make(ranks, "plain", 0)
    kept = Checkpoints(folder, ranks)
    kept.save(1, state, {})
    if ranks.rank == 1:
        os._exit(0)
    said = _complaint(lambda: kept.save(2, state, {}), CheckpointError)
    assert "step 2 was not saved: states: a rank is gone" in said and "00001" in said, said
    os._exit(0)
