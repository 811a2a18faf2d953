"""The pictures in flight against the solver that decodes: the same states, each row at its step."""

import json
from pathlib import Path

import pytest
import torch

from dar_fast.config import TokenizerConfig
from dar_fast.flow import Trajectory
from dar_train.rollout import Rollout

CPU = torch.device("cpu")


def tokenizer_config(model_files) -> TokenizerConfig:
    return TokenizerConfig.from_dict(json.loads(Path(model_files["tokenizer"]).read_text()))


def test_a_flight_is_a_trajectory(model_files) -> None:
    config = tokenizer_config(model_files)
    rollout, S, R = Rollout(config, CPU), config.num_steps, config.image_size
    runs: list[Trajectory] = []
    for start in range(S + 2):  # one picture boards a step; those of S steps leave
        image, noise = torch.randn(2, 1, 3, R, R)
        runs.append(Trajectory(noise, rollout.times.tolist(), rollout.data_std))
        flight = rollout.board(image, noise)
        given = [part.clone() for part in flight]
        flying = runs[-len(flight.x) :]
        assert len(flying) == min(start + 1, S)
        assert flight.step.tolist() == rollout.taken == [run.step for run in flying]
        torch.testing.assert_close(flight.x, torch.cat([run.x for run in flying]))
        states = rollout.states(flight)
        assert states.t.tolist() == [run.time for run in flying]
        Q = config.group_size
        assert states.start.tolist() == [
            min(int(run.step / S * config.num_groups + 0.5), config.num_groups - 1) * Q
            for run in flying
        ]
        assert rollout.tokens_used() == int((states.start + Q).sum())
        velocity = torch.randn_like(flight.x)
        rollout.advance(velocity)
        assert all(torch.equal(a, b) for a, b in zip(flight, given, strict=True))
        for run, row in zip(flying, velocity, strict=True):
            run.advance(row.flatten()[None, None])
        assert [run.done for run in runs] == [i <= start - S + 1 for i in range(len(runs))]


def test_a_filled_flight_is_full_from_the_first_step(model_files) -> None:
    config = tokenizer_config(model_files)
    rollout, S, R = Rollout(config, CPU), config.num_steps, config.image_size
    images, noise = torch.randn(2, 2 * (S - 1), 3, R, R)
    rollout.fill(images, noise)
    expected = [step for step in range(S - 1, 0, -1) for _ in range(2)]
    for _ in range(S + 1):
        assert rollout.taken == expected
        flight = rollout.board(*torch.randn(2, 2, 3, R, R))
        assert flight.step.tolist() == [*expected, 0, 0]
        rollout.advance(torch.randn_like(flight.x))


def test_loss_is_what_the_previews_miss(model_files) -> None:
    config = tokenizer_config(model_files)
    rollout, R = Rollout(config, CPU), config.image_size
    images, noise = torch.randn(2, config.num_steps - 1, 3, R, R)
    rollout.fill(images, noise)
    flight = rollout.flight
    assert flight is not None
    x_1 = rollout.data_std * images
    right = rollout.loss(flight, x_1 - noise)
    torch.testing.assert_close(right, torch.zeros(()))
    assert rollout.loss(flight, x_1 - noise + 1) > 0.01


def test_a_saved_flight_is_loaded_by_its_owners(model_files) -> None:
    config = tokenizer_config(model_files)
    S, R = config.num_steps, config.image_size
    rollout = Rollout(config, CPU)
    rollout.fill(*torch.randn(2, 3 * (S - 1), 3, R, R))
    saved = rollout.tensors(torch.tensor([4, 0, 2]), 5)
    assert saved["rollout.x"].shape == (S - 1, 5, 3, R, R)
    assert not saved["rollout.x"][:, [1, 3]].any()
    other = Rollout(config, CPU)
    other.load(saved, torch.tensor([2]))
    assert other.flight is not None and rollout.flight is not None
    assert other.taken == list(range(S - 1, 0, -1))
    for mine, all_three in zip(other.flight, rollout.flight, strict=True):
        assert torch.equal(mine, all_three[2::3])


def test_an_empty_flight_does_not_advance(model_files) -> None:
    rollout = Rollout(tokenizer_config(model_files), CPU)
    assert rollout.tensors(torch.arange(2), 2) == {}
    with pytest.raises(ValueError, match="expected pictures in flight, got none"):
        rollout.advance(torch.zeros(1, 3, 16, 16))
