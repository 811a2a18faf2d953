"""Trainings of a few steps, on one rank or on several, and what each rank found."""

import dataclasses
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dar_fast.models import Prior
from dar_train.distributed import Ranks, joined
from dar_train.loop import Loop
from dar_train.parallel import Parallel, parallelize
from dar_train.prior_task import PriorTask
from dar_train.recipes import PriorRecipe, Recipe, TokenizerRecipe
from dar_train.shards import assign, whole
from dar_train.tokenizer_loop import tokenizer_loop
from dar_train.tokens import CodeBatch
from tiny_models import TINY_PRIOR, perturb

STEPS = 3


class FixedCodes:
    """Batch n is a function of n; a rank has its samples of it."""

    def __init__(self, batch: int, ranks: Ranks) -> None:
        self.batch, self.ranks, self.position = batch, ranks, 0

    def next(self) -> CodeBatch:
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        shape = (self.batch, TINY_PRIOR.num_tokens)
        codes = torch.randint(TINY_PRIOR.vocab_size, shape, generator=generator)
        labels = torch.randint(TINY_PRIOR.num_classes, (self.batch,), generator=generator)
        each = self.batch // self.ranks.world
        mine = slice(each * self.ranks.rank, each * (self.ranks.rank + 1))
        return CodeBatch(codes[mine], labels[mine])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def skipped(self) -> tuple[str, ...]:
        return ()

    def close(self) -> None:
        pass


def make_loop(recipe: Recipe, ranks: Ranks) -> Loop[Any]:
    if isinstance(recipe, TokenizerRecipe):
        return tokenizer_loop(recipe, ranks)
    assert isinstance(recipe, PriorRecipe)
    torch.manual_seed(0)
    model = Prior(TINY_PRIOR)
    perturb(model, 1)
    parallel = parallelize(model, "loss", recipe, ranks, list(model.blocks()))
    nothing = SimpleNamespace(held_out=torch.arange(1), labels=torch.zeros(1, dtype=torch.int64))
    task = PriorTask(recipe, parallel, FixedCodes(recipe.batch, ranks), nothing, None)  # type: ignore[arg-type]
    return Loop(recipe, task, parallel)


def train(name: str, recipe: Recipe, ranks: Ranks, folder: Path) -> Loop[Any]:
    """Some steps; the first rank writes gradients, weights and averages as `<name>.safetensors`."""
    loop = make_loop(recipe, ranks)
    loop.task.model.train()
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        parts = loop.step()
        loop.task.after_step(*loop._last, loop)
        found[f"norm {step}"] = parts["grad_norm"].reshape(1)
        found[f"loss {step}"] = loop.parallel.mean(parts["loss"]).reshape(1)
        for key, parameter in loop.task.model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient {step} {key}"] = whole(parameter.grad).clone()
    for kind, module in (("weight", loop.task.model), ("average", loop.ema.module)):
        gathered = loop.parallel.gathered(module)
        assert (gathered is None) == (not ranks.first)
        if gathered is not None:
            found |= {f"{kind} {key}": value for key, value in gathered.state_dict().items()}
    if ranks.first:
        tensors = {key: value.detach().clone().contiguous() for key, value in found.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return loop


def messages(parallel: Parallel) -> dict[str, Any]:
    rank = parallel.ranks.rank
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    return {
        "sum": parallel.sum(mine).tolist(),
        "mean": parallel.mean(mine).tolist(),
        "mine": mine.tolist(),
        "share": parallel.share({"rank": rank, "text": "é", "list": [1, None]}),
    }


def shards(loop: Loop[Any]) -> dict[str, Any]:
    """What a rank holds of a sharded model, before and after passes without gradients."""
    model = loop.task.model
    with torch.no_grad():
        rows = model.pre_quantize(torch.zeros(2, 3, 16, 16))
    kinds = {isinstance(p, DTensor) for p in model.parameters()}
    held = sum(p.to_local().numel() for p in model.parameters())
    table = model.quantizer.codebook
    assign(table, torch.arange(float(table.numel())).view(table.shape))
    again = loop.ema.module
    return {
        "rows": list(rows.shape),
        "all sharded": kinds == {True} and all(isinstance(p, DTensor) for p in again.parameters()),
        "held": held,
        "total": sum(p.numel() for p in model.parameters()),
        "written": whole(table).flatten().tolist() == list(map(float, range(table.numel()))),
    }


def one_rank(rank: int, world: int, port: int, folder: Path, recipes: dict[str, Recipe]) -> None:
    """What each process runs."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with joined("cpu", timeout_minutes=3) as ranks:
        for name, recipe in recipes.items():
            mine = dataclasses.replace(recipe, out=folder / name)
            loop = train(name, mine, ranks, folder)
            if name == "tokenizer-fsdp":
                found["shards"] = shards(loop)
        found["messages"] = messages(loop.parallel)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
