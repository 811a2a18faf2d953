"""A tokenizer's loss by micro-batches and by ranks is the whole batch's; no tokens in vain."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dar_fast.models import Tokenizer
from dar_train.data import PictureBatch
from dar_train.distributed import Ranks
from dar_train.draws import Draws
from dar_train.parallel import Parallel
from dar_train.task import rows_of
from dar_train.tokenizer_figures import HeldOutFigures
from dar_train.tokenizer_loop import make_tokenizer
from dar_train.tokenizer_task import TokenizerTask

CPU = torch.device("cpu")
BATCH = 8
R = 16


class Call(NamedTuple):
    pictures: int
    tokens: int | None


class Spy(Parallel):
    """One rank of several that do not talk."""

    calls: list[Call]

    def call(self, *args, **kwargs):
        self.calls.append(Call(len(args[0]), kwargs.get("tokens")))
        return super().call(*args, **kwargs)

    def sum(self, x: Tensor) -> Tensor:
        return x


class NoBatches:
    """What a task has and these tests do not read."""


@pytest.fixture
def make_task(tokenizer_recipe, tmp_path) -> Callable[..., TokenizerTask]:
    held_out = HeldOutFigures(torch.zeros(1, 3, R, R, dtype=torch.uint8), 0, tmp_path, CPU)

    def make(rank: int = 0, world: int = 1, **changes) -> TokenizerTask:
        recipe = tokenizer_recipe(
            batch=BATCH, gate_init=0.3, augment=True, override=("encoder_depth=2",), **changes
        )
        model = make_tokenizer(recipe, recipe.config(), CPU)
        parallel = Spy(model, "training_forward", Ranks(rank, world, 0, CPU))
        parallel.calls = []
        return TokenizerTask(recipe, parallel, NoBatches(), held_out, lambda: None)  # type: ignore

    return make


def pictures(step: int) -> PictureBatch:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(256, (BATCH, 3, R, R), generator=generator, dtype=torch.uint8)
    return PictureBatch(images, torch.zeros(BATCH, dtype=torch.int64), torch.arange(BATCH))


def draws_of(step: int, positions: Tensor) -> Draws:
    return Draws(3, step, BATCH, positions, CPU)


def add_gradients(
    task: TokenizerTask, step: int, share: Tensor, micro_batch: int, weight: float = 1.0
) -> float:
    """One rank's passes of a step, as the loop makes them."""
    batch, draws = rows_of(pictures(step), share), draws_of(step, share)
    rows = task.arrange(batch, draws)
    rows = torch.arange(len(share)) if rows is None else rows
    total = 0.0
    for piece in rows.split(micro_batch):
        loss = task.loss(rows_of(batch, piece), draws.take(piece)).total
        loss = loss * weight * len(piece) / len(share)
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(model: Tokenizer) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


CASES = [
    {"draws_per_image": 1}, {"draws_per_image": 3}, {"continuous_steps": 2},
]  # fmt: skip


@pytest.mark.parametrize("changes", CASES, ids=["one-draw", "three-draws", "continuous"])
@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_micro_batches_make_the_batch(make_task, changes, micro_batch) -> None:
    whole, parts = make_task(**changes), make_task(**changes)
    everything = torch.arange(BATCH)
    assert add_gradients(whole, 1, everything, BATCH) == pytest.approx(
        add_gradients(parts, 1, everything, micro_batch), rel=1e-5
    )
    torch.testing.assert_close(gradients(parts.model), gradients(whole.model), rtol=1e-3, atol=1e-5)
    assert len(gradients(whole.model)) == len(list(whole.model.parameters()))


@pytest.mark.parametrize("rollout", [0.0, 2.0])
def test_ranks_make_the_batch(make_task, rollout) -> None:
    micro_batch = BATCH if rollout else 3
    whole = make_task(rollout=rollout)
    ranks = [make_task(rank, 2, rollout=rollout) for rank in range(2)]
    for step in range(3):  # a flight has a history
        whole.model.zero_grad()
        expected = add_gradients(whole, step, torch.arange(BATCH), micro_batch)
        actual, sums = 0.0, {}
        for rank, task in enumerate(ranks):
            task.model.zero_grad()
            share = torch.arange(BATCH // 2) + rank * BATCH // 2
            actual += add_gradients(task, step, share, micro_batch, weight=0.5)
            for name, gradient in gradients(task.model).items():
                sums[name] = sums.get(name, 0) + gradient
        assert actual == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(sums, gradients(whole.model), rtol=1e-3, atol=1e-5)
    states = [task.state_dict() for task in ranks]
    for name, tensor in whole.state_dict().items():
        merged = states[0][name] + states[1][name]
        torch.testing.assert_close(merged, tensor, rtol=1e-4, atol=1e-5)


def test_flights_move_to_other_ranks(make_task) -> None:
    whole = make_task(rollout=1.0)
    add_gradients(whole, 0, torch.arange(BATCH), BATCH)
    state = whole.state_dict()
    add_gradients(whole, 1, torch.arange(BATCH), BATCH)
    for rank in range(2):
        part = make_task(rank, 2, rollout=1.0)
        part.load_state_dict(state)
        assert part.state_dict()["rollout.x"] is state["rollout.x"]  # before its place is known
        share = torch.arange(BATCH // 2) + rank * BATCH // 2
        add_gradients(part, 1, share, BATCH)
        mine = part.state_dict()["rollout.x"][:, share]
        torch.testing.assert_close(mine, whole.state_dict()["rollout.x"][:, share])


def test_micro_batches_compute_the_tokens_that_they_need(make_task) -> None:
    task = make_task()
    add_gradients(task, 1, torch.arange(BATCH), 2)
    u = draws_of(1, torch.arange(BATCH)).host_uniform("time", 1)[:, 0]
    K, N = task.config.num_groups, task.config.num_tokens
    ends = ((u * K + 0.5).floor().clamp(max=K - 1).long() + 1) * (N // K)
    expected = ends.sort().values.view(-1, 2).amax(1).tolist()
    assert [call.tokens for call in task.parallel.calls] == expected
    assert sum(expected) < N * len(expected)  # the draws of this test


def test_codes_are_counted_over_the_log_lines(make_task) -> None:
    task = make_task()
    add_gradients(task, 1, torch.arange(BATCH), BATCH)
    used = int((task.use.counts > 0).sum())
    notes = task.notes()
    V = task.config.codebook_size
    assert notes["codes_used"] == used / V
    assert notes["codes_dead"] == V - used
    assert 1 <= notes["perplexity"] <= used + 1e-6
    assert task.notes() == {"codes_used": 0.0, "perplexity": 0.0, "codes_dead": V}


def test_a_state_of_another_codebook_is_refused(make_task) -> None:
    state = {"codebook.recent": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"checkpoint: expected 32 codes, got \[3\]"):
        make_task().load_state_dict(state)
