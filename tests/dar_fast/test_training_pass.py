"""A training pass of the tokenizer computes what its draws need, and its pieces add up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_fast.models import Tokenizer
from dar_fast.models.tokenizer import States, TokenizerTraining
from tiny_models import TINY_TOKENIZER, perturb

Q, N, R = TINY_TOKENIZER.group_size, TINY_TOKENIZER.num_tokens, TINY_TOKENIZER.image_size
EXACT = {"rtol": 1e-10, "atol": 1e-10}
TIMES = st.floats(0, 1, exclude_max=True, width=32)


@pytest.fixture(scope="module")
def model() -> Tokenizer:
    """In fp64, with an alignment head, far from its start."""
    dit = replace(TINY_TOKENIZER.dit, repa_layer=1)
    made = Tokenizer(replace(TINY_TOKENIZER, dit=dit, encoder_depth=2))
    perturb(made, 5)
    return made.double()


def inputs(pictures: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shape = (3, R, R)
    images = 2 * torch.rand(pictures, *shape, generator=generator, dtype=torch.float64) - 1
    return images, torch.randn(rows, *shape, generator=generator, dtype=torch.float64)


def total(out: TokenizerTraining) -> torch.Tensor:
    parts = [out.fm, out.vq, out.commit, out.predicted_images.square().mean()]
    if out.repa is not None:
        parts.append(out.repa.square().mean())
    if out.state_velocity is not None:
        parts.append(out.state_velocity.square().mean())
    return torch.stack(parts).sum()


def gradients(model: Tokenizer, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ends(model: Tokenizer, u: torch.Tensor) -> list[int]:
    return (model.drawn(u)[1] + Q).tolist()


@pytest.mark.slow
@given(st.lists(TIMES, min_size=1, max_size=4), st.integers(1, 2), st.booleans())
@settings(max_examples=8, deadline=None)
def test_tokens_behind_the_drawn_groups_change_nothing(model, drawn, draws, free) -> None:
    u = torch.tensor(drawn * draws, dtype=torch.float64)
    images, noise = inputs(len(drawn), len(u))
    code_noise = None
    if free:
        code_noise = torch.randn(len(drawn), N, TINY_TOKENIZER.code_dim, dtype=torch.float64)
    whole = model.training_forward(images, u, noise, code_noise)
    least = max(ends(model, u))
    part = model.training_forward(images, u, noise, code_noise, tokens=least)
    assert part.codes.shape == (len(drawn), least)
    assert torch.equal(part.codes, whole.codes[:, :least])
    torch.testing.assert_close(total(part), total(whole), **EXACT)
    expected, actual = gradients(model, total(whole)), gradients(model, total(part))
    assert expected.keys() == actual.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(actual, expected, **EXACT)


def test_states_are_covered_too(model) -> None:
    u = torch.tensor([0.1, 0.05], dtype=torch.float64)
    images, noise = inputs(2, 2)
    states = States(noise.flip(0), torch.tensor([0.2, 0.3]).double(), torch.tensor([Q, 0]))
    whole = model.training_forward(images, u, noise, states=states)
    part = model.training_forward(images, u, noise, states=states, tokens=2 * Q)
    torch.testing.assert_close(total(part), total(whole), **EXACT)
    with pytest.raises(ValueError, match=rf"tokens: expected an integer in \[{2 * Q}, {N}\]"):
        model.training_forward(images, u, noise, states=states, tokens=Q)


@pytest.mark.parametrize("tokens", [0, Q, N + 1])
def test_tokens_must_cover_the_draws(model, tokens) -> None:
    images, noise = inputs(1, 1)
    with pytest.raises(ValueError, match=f"tokens: expected an integer in .*, got {tokens}"):
        model.training_forward(images, torch.tensor([0.6]).double(), noise, tokens=tokens)


@pytest.mark.slow
@given(st.lists(TIMES, min_size=2, max_size=5), st.data())
@settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_batch(model, drawn, data) -> None:
    u = torch.tensor(drawn, dtype=torch.float64)
    images, noise = inputs(len(u), len(u))
    expected = gradients(model, (whole := model.training_forward(images, u, noise)).vq + whole.fm)
    order = u.argsort()
    cut = data.draw(st.integers(1, len(u) - 1))
    used = sum(ends(model, u))
    losses = []
    for rows in (order[:cut], order[cut:]):
        part = model.training_forward(
            images[rows], u[rows], noise[rows],
            tokens=max(ends(model, u[rows])), count=used / len(u) * len(rows),
        )  # fmt: skip
        losses.append((part.vq + part.fm) * len(rows) / len(u))
    torch.testing.assert_close(torch.stack(losses).sum(), whole.vq + whole.fm, **EXACT)
    torch.testing.assert_close(gradients(model, *losses), expected, **EXACT)


def test_the_alignment_head_runs_on_request(model) -> None:
    images, noise = inputs(1, 1)
    u = torch.tensor([0.4], dtype=torch.float64)
    assert model.training_forward(images, u, noise).repa.shape == (1, 256, 768)
    without = model.training_forward(images, u, noise, align=False)
    assert without.repa is None
    names = set(gradients(model, total(without)))
    assert {n for n, _ in model.named_parameters()} - names == {
        f"pixel_dit.repa_out.{i}.{part}" for i in (0, 2, 4) for part in ("weight", "bias")
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
def test_graphs_serve_every_length() -> None:
    """Two lengths may make all graphs there are: a block, and a last one, of each stack."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = Tokenizer(replace(TINY_TOKENIZER, encoder_depth=3, decoder_depth=3))
    stacks = made.encoder.layers, made.token_decoder.layers, made.pixel_dit.blocks
    for block in (block for stack in stacks for block in stack):
        block.compile(dynamic=getattr(block, "dynamic", False), backend="eager")
    counts = []
    for tokens in (2 * Q, Q, 3 * Q, N):
        u = torch.tensor([0.01, (tokens / Q - 1) / TINY_TOKENIZER.num_groups - 0.01])
        images, noise = (x.float() for x in inputs(2, 2))
        out = made.training_forward(images, u.clamp(min=0), noise, tokens=tokens)
        total(out).backward()
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[1] <= 6
    assert counts[1:] == counts[1:2] * 3
    torch._dynamo.reset()
