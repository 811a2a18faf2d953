"""Numbers of a step belong to samples: whatever the ranks, micro-batches and order of calls."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_train.draws import Draws

CPU = torch.device("cpu")


def whole(total: int, step: int = 0, seed: int = 0) -> Draws:
    return Draws(seed, step, total, torch.arange(total), CPU)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.data())
def test_a_sample_keeps_its_numbers(total, data) -> None:
    rows = torch.tensor(data.draw(st.permutations(range(total))))
    rows = rows[: data.draw(st.integers(0, total))]
    everyone, some = whole(total), whole(total).take(rows)
    assert torch.equal(some.uniform("u", 3), everyone.uniform("u", 3)[rows])
    assert torch.equal(some.normal("n", 2, 5), everyone.normal("n", 2, 5)[rows])
    assert torch.equal(some.whole().uniform("u", 3), everyone.uniform("u", 3))


def test_names_steps_and_seeds_draw_other_numbers() -> None:
    first = whole(64).uniform("a")
    others = [whole(64).uniform("b"), whole(64, 1).uniform("a"), whole(64, 0, 1).uniform("a")]
    assert torch.equal(first, whole(64).uniform("a"))
    assert all(not torch.isclose(first, other).any() for other in others)
    noise = whole(64).normal("a", 7)
    others = [whole(64).normal("b", 7), whole(64, 1).normal("a", 7), whole(64, 0, 1).normal("a", 7)]
    assert all(not torch.isclose(noise, other).all(dim=1).any() for other in others)


def test_noise_is_standard_normal_and_uniforms_are_uniform() -> None:
    noise = whole(256).normal("n", 500).double()
    assert abs(float(noise.mean())) < 0.015
    assert abs(float(noise.var()) - 1) < 0.03
    u = whole(100_000).uniform("u").double()
    assert 0 <= float(u.min()) and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 0.005
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.2  # neighbours share nothing


def test_modules_are_seeded_by_step_rank_and_piece() -> None:
    def seeded(draws: Draws, rank: int) -> float:
        draws.seed_module(rank)
        return float(torch.rand(()))

    draws = whole(8)
    seen = [
        seeded(draws, 0), seeded(draws, 1), seeded(whole(8, 1), 0),
        seeded(draws.take(torch.tensor([4, 5])), 0),
    ]  # fmt: skip
    assert len(set(seen)) == 4
    assert seeded(draws, 0) == seen[0]
