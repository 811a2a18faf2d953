"""The pictures in flight against the solver that decodes: the same states, each row at its step."""

import json
from pathlib import Path

import torch

from dar_fast.config import TokenizerConfig
from dar_fast.flow import Trajectory
from dar_train.rollout import Rollout


def tokenizer_config(model_files) -> TokenizerConfig:
    return TokenizerConfig.from_dict(json.loads(Path(model_files["tokenizer"]).read_text()))


def test_a_flight_is_a_trajectory(model_files) -> None:
    config = tokenizer_config(model_files)
    rollout, S, R = Rollout(config, torch.device("cpu")), config.num_steps, config.image_size
    runs: list[Trajectory] = []
    for start in range(S + 2):  # one picture boards a step; those of S steps leave
        image, noise = torch.randn(2, 1, 3, R, R)
        runs.append(Trajectory(noise, rollout.times.tolist(), rollout.data_std))
        flight = rollout.board(image, noise)
        given = [part.clone() for part in flight]
        flying = runs[-len(flight.x) :]
        assert len(flying) == min(start + 1, S)
        assert flight.step.tolist() == [run.step for run in flying]
        torch.testing.assert_close(flight.x, torch.cat([run.x for run in flying]))
        velocity = torch.randn_like(flight.x)
        rollout.advance(velocity)
        assert all(torch.equal(a, b) for a, b in zip(flight, given, strict=True))
        for run, row in zip(flying, velocity, strict=True):
            run.advance(row.flatten()[None, None])
        assert [run.done for run in runs] == [i <= start - S + 1 for i in range(len(runs))]


def test_loss_is_what_the_previews_miss(model_files) -> None:
    config = tokenizer_config(model_files)
    rollout, R = Rollout(config, torch.device("cpu")), config.image_size
    images, noise = torch.randn(2, config.num_steps, 3, R, R)
    rollout.fill(images, noise)
    flight = rollout.flight
    assert flight is not None
    assert flight.step.tolist() == list(range(config.num_steps - 1, -1, -1))
    x_1 = rollout.data_std * images
    right = rollout.loss(flight, x_1 - noise)
    torch.testing.assert_close(right, torch.zeros(()))
    assert rollout.loss(flight, x_1 - noise + 1) > 0.01
