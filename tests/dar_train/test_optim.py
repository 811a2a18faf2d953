"""Schedules against their formulas, parameter groups, and the weight average."""

import copy

import pytest
import torch
from torch import nn

from dar_train.optim import (
    Ema,
    build_optimizers,
    progress,
    rate_scale,
    set_learning_rate,
    split_parameters,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def test_split_names() -> None:
    split = split_parameters(Net())
    assert [n for n, _ in split.hidden] == ["blocks.0.weight", "blocks.1.weight"]
    assert [n for n, _ in split.decayed] == ["embed.weight", "head.weight"]
    assert {n for n, _ in split.plain} == {
        "blocks.0.bias", "blocks.1.bias", "norm.weight", "norm.bias", "head.bias",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_decay_only_on_matrices(kind) -> None:
    net = Net()
    optimizers = build_optimizers(net, kind, lr=0.1, weight_decay=0.5)
    seen = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                seen.append(parameter)
                assert group["weight_decay"] == (0.5 if parameter.ndim >= 2 else 0.0)
    assert len(seen) == len(list(net.parameters())) == len({id(p) for p in seen})


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="expected 'adamw' or 'muon', got 'sgd'"):
        build_optimizers(Net(), "sgd", lr=0.1)  # type: ignore[arg-type]


def test_set_learning_rate_scales_each_peak() -> None:
    optimizers = build_optimizers(Net(), "muon", lr=0.001, muon_lr=0.02)
    set_learning_rate(optimizers, 0.5)
    rates = [group["lr"] for o in optimizers for group in o.param_groups]
    assert rates == [0.01, 0.0005, 0.0005]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimizers_reduce_a_loss(kind) -> None:
    torch.manual_seed(0)
    net = Net()
    optimizers = build_optimizers(net, kind, lr=0.01)
    x, y = torch.arange(5), torch.tensor([1, 2, 3, 4, 0])
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("schedule", "done", "expected"),
    [
        ("constant", 0.9, 1.0),
        ("linear", 0.5, 1.0),
        ("linear", 0.8, 1.0),
        ("linear", 0.9, 0.55),
        ("linear", 1.0, 0.1),
        ("wsd", 0.85, 0.1 + 0.9 * 0.5),
        ("wsd", 1.0, 0.1),
        ("cosine", 0.0, 1.0),
        ("cosine", 0.5, 0.55),
        ("cosine", 1.0, 0.1),
    ],
)
def test_rate_after_warmup(schedule, done, expected) -> None:
    scale = rate_scale(10**6, done, schedule=schedule, warmup=10, decay_fraction=0.2, final=0.1)
    assert scale == pytest.approx(expected)


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    scales = [rate_scale(step, 0.0, warmup=4) for step in range(6)]
    assert scales == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="got 'step'"):
        rate_scale(0, 0.0, schedule="step")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "budget", "expected"),
    [(100, None, 0.5), (None, 40.0, 0.25), (100, 10.0, 1.0), (100, 12.5, 0.8), (None, None, 0.0)],
)
def test_progress_is_the_further_of_steps_and_time(steps, budget, expected) -> None:
    assert progress(50, steps, 10.0, budget) == expected


def test_ema_follows_its_formula() -> None:
    torch.manual_seed(0)
    net = Net()
    net.register_buffer("count", torch.zeros(1))
    ema = Ema(net, 0.5)
    expected = copy.deepcopy(net)
    for n in range(12):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
            net.count += 1
            decay = min(0.5, (1 + n) / (10 + n))
            for mine, theirs in zip(expected.parameters(), net.parameters(), strict=True):
                mine.copy_(decay * mine + (1 - decay) * theirs)
        ema.update()
    assert ema.updates == 12
    for mine, theirs in zip(ema.module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert not mine.requires_grad
    assert float(ema.module.count) == 12


def test_ema_refuses_a_decay_of_one() -> None:
    with pytest.raises(ValueError, match=r"expected a decay in \[0, 1\), got 1"):
        Ema(Net(), 1.0)
