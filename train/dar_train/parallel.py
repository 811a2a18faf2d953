"""One model on many ranks: DDP keeps it whole on each, FSDP2 a shard of every weight.

The gradient of a step is the mean of the ranks', so ranks with B samples each step as one with W·B.
A step sends, for P weights of 4 bytes, 2·4·P by DDP (all-reduce) and 3·4·P by FSDP2 a micro-batch
(two all-gathers, a reduce-scatter), and holds 16·P or 16·P/W bytes beside the activations.
Source: arXiv 2304.11277; PyTorch's fully_shard.
"""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dar_train import float8
from dar_train.distributed import Ranks
from dar_train.recipes import Recipe
from dar_train.shards import whole

T = TypeVar("T")


class Parallel:
    """A model whose `method` runs on all ranks; made by `parallelize`."""

    def __init__(self, model: nn.Module, method: str, ranks: Ranks) -> None:
        self.model = model
        self.method = method
        self.ranks = ranks

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The model's method, with what the ranks do before, within and after it."""
        return getattr(self.model, self.method)(*args, **kwargs)

    @contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        """Around the passes of one micro-batch; `more`: others of the same step follow."""
        yield

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most `max_norm`; returns the norm, a scalar.

        Nothing is read on the host.
        """
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return whole(nn.utils.clip_grad_norm_(parameters, max_norm))

    def gathered(self, module: nn.Module) -> nn.Module | None:
        """The model, or an average of it, with whole weights and for evaluation, on the first rank.

        Where nothing is sharded it is `module` itself. None on the others, which all call it too.
        """
        return module if self.ranks.first else None

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over the ranks, on each of them, detached."""
        return x if self.ranks.world == 1 else self.sum(x) / self.ranks.world

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks, on each of them, detached."""
        if self.ranks.world == 1:
            return x
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def share(self, value: T) -> T:
        """The first rank's value, which JSON can hold, on every rank."""
        if self.ranks.world == 1:
            return value
        sent = json.dumps(value).encode() if self.ranks.first else b""
        length = torch.tensor(len(sent))
        dist.broadcast(length, 0)
        text = torch.empty(int(length), dtype=torch.uint8)
        if self.ranks.first:
            text = torch.frombuffer(bytearray(sent), dtype=torch.uint8)
        dist.broadcast(text, 0)
        return cast(T, json.loads(text.numpy().tobytes()))


class _Pass(nn.Module):
    """A method of a model as a forward pass, the place of DDP's hooks."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model = model
        self.method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model, self.method)(*args, **kwargs)


class _Replicated(Parallel):
    """By DDP. Which weights have a gradient may depend only on which arguments are given.

    DDP's static graph finds them out in the first step; another set of arguments, such as the code
    noise of a tokenizer's first steps, is another graph and is wrapped anew.
    """

    def __init__(self, model: nn.Module, method: str, ranks: Ranks) -> None:
        super().__init__(model, method, ranks)
        self._given: tuple[object, ...] | None = None
        self._settled = False  # whether DDP knows the graph; until then it may not skip a sum
        self._wrapped = self._wrap(first=True)

    def _wrap(self, first: bool = False) -> DistributedDataParallel:
        device = self.ranks.device
        return DistributedDataParallel(
            _Pass(self.model, self.method),
            device_ids=[device] if device.type == "cuda" else None,
            init_sync=first,  # later the weights are equal
            gradient_as_bucket_view=True,
            static_graph=True,
        )

    def call(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().call(*args, **kwargs)
        given = (
            *(arg is not None for arg in args),
            *sorted(name for name, arg in kwargs.items() if arg is not None),
        )
        if given != self._given:
            if self._given is not None:
                del self._wrapped  # and its hooks, before others take their place
                self._wrapped = self._wrap()
            self._given, self._settled = given, False
        return self._wrapped(*args, **kwargs)

    @contextmanager
    def accumulating(self, more: bool) -> Iterator[None]:
        # a sum of gradients that were summed before adds nothing wrong: all ranks hold the same
        if more and self._settled:
            with self._wrapped.no_sync():
                yield
        else:
            yield
            self._settled = True


class _Sharded(Parallel):
    """By FSDP2: a group of weights a block, gathered around its passes; the root's for the method.

    Gradients are reduced with every micro-batch: to keep them whole would cost 4 bytes a weight,
    and the exchange overlaps the backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        ranks: Ranks,
        blocks: Iterable[nn.Module],
        also: Iterable[str],
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__(model, method, ranks)
        nameless = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in model.parameters()
        }
        self._skeleton = copy.deepcopy(model, nameless)  # without weights, and without FSDP's hooks
        mesh = init_device_mesh(ranks.device.type, (ranks.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for name in (method, *also):
            register_fsdp_forward_method(model, name)
            setattr(model, name, partial(self._pass, getattr(model, name)))
        # FSDP refuses to be copied; an average is a plain module with shards of its own
        model.__deepcopy__ = self._copied  # type: ignore[assignment]

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        self.model.reshard()  # type: ignore[operator]
        return _filled(self._skeleton, {n: p.detach().clone() for n, p in _tensors(self.model)})

    def _pass(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # of results that are views: nothing of ours changes them in place
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            result = method(*args, **kwargs)
        if not torch.is_grad_enabled():
            self.model.reshard()  # type: ignore[operator]  # a backward pass would have done it
        return result

    def gathered(self, module: nn.Module) -> nn.Module | None:
        tensors = {}
        for name, tensor in _tensors(module):
            full = whole(tensor)
            if self.ranks.first:
                tensors[name] = full
        if not self.ranks.first:
            return None
        return _filled(self._skeleton, tensors).eval().requires_grad_(False)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _filled(skeleton: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of `skeleton` with these parameters and buffers in place of its own."""
    memo: dict[int, Any] = {}
    for name, old in _tensors(skeleton):
        new = tensors[name]
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        memo[id(old)] = new
    return copy.deepcopy(skeleton, memo)


def check_parallel(recipe: Recipe, ranks: Ranks) -> None:
    """Raise ValueError where so many ranks cannot do what `recipe` asks."""
    if recipe.batch % ranks.world:
        raise ValueError(
            f"batch: expected a multiple of the {ranks.world} ranks, got {recipe.batch}"
        )
    if recipe.parallel == "fsdp" and recipe.optimizer == "muon" and ranks.world > 1:
        raise ValueError(
            "optimizer: expected 'adamw' with parallel 'fsdp', got 'muon', which needs whole "
            "matrices"
        )


def parallelize(
    model: nn.Module,
    method: str,
    recipe: Recipe,
    ranks: Ranks,
    blocks: Iterable[nn.Module],
    also: Iterable[str] = (),
) -> Parallel:
    """`model` on all ranks, as the recipe says; its optimizers and averages are made afterwards.

    Args:
        model: on the device of this rank, the same on every rank; `recompute` comes before.
        method: of the model, what a step calls: through `Parallel.call`.
        blocks: repeated parts, each compiled and sharded by itself.
        also: further methods that a run calls by themselves on a sharded model, without gradients.

    Raises:
        ValueError: where the recipe asks for what does not go together.
    """
    blocks = list(blocks)
    check_parallel(recipe, ranks)
    if recipe.float8:
        float8.convert(blocks, ranks.device)
    if recipe.compile:
        for block in blocks:  # one compilation serves all blocks of a kind
            dynamic = getattr(block, "dynamic", False)
            # any number of tokens, on a CPU: a minute of compilation for 4 % of tokenizer lite
            if not (dynamic and ranks.device.type == "cpu"):
                block.compile(dynamic=dynamic)
    if ranks.world == 1:
        return Parallel(model, method, ranks)
    if recipe.parallel == "fsdp":
        return _Sharded(model, method, ranks, blocks, also)
    return _Replicated(model, method, ranks)
