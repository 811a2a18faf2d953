"""Solver steps over slots against `Tokenizer.decode`: any mix of requests, each at its own step."""

import copy
import math

import pytest
import torch
from diffusion_helpers import (
    ONE_CODE_A_GROUP,
    NoHostReads,
    decoded,
    extend_all,
    launchers,
    random_codes,
    random_tokenizer,
    ready,
    rows,
)
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dar_fast.config import TOKENIZERS
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.diffusion import TABLE_STEPS, TABLES, Diffusion
from dar_fast.engine.rows import StepRow
from dar_fast.engine.slots import SlotState
from dar_fast.flow import SOLVERS
from dar_fast.models import Tokenizer
from dar_fast.models.pixel_dit import DiTBlock
from dar_kernels import prefer

STEPS = (1, 2, 3, 4, 8, 12, 16)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def count_conditions(monkeypatch):
    """Rows of every call of a block's `condition`."""
    calls, method = [], DiTBlock.condition
    monkeypatch.setattr(
        DiTBlock, "condition", lambda self, c: (calls.append(len(c)), method(self, c))[1]
    )
    return calls


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("S", STEPS)
def test_all_previews_and_the_picture(tiny_pipeline, monkeypatch, S, solver):
    tokenizer = tiny_pipeline.tokenizer
    codes, seeds = random_codes(tokenizer.config, 3), [5, 2**62, 0]
    expected = [
        tokenizer.decode(codes, seeds=seeds, num_steps=S, solver=solver, stop_after=i + 1)
        for i in range(S)
    ]
    picture = tokenizer.decode(codes, seeds=seeds, num_steps=S, solver=solver)
    calls = count_conditions(monkeypatch)
    diffusion = ready(tokenizer, codes)
    assert not calls
    images, previews = decoded(diffusion, seeds, S, solver)
    # once a group that any step reads, however many do
    read = {tokenizer.group_start(i, S) for i in range(S)}
    assert calls == [3] * tokenizer.config.dit.depth * len(read)
    close(torch.stack(previews), torch.stack(expected))  # none overwritten by a later step
    close(images, picture)
    assert images.std() > 0.1 and previews[0].dtype == torch.float32


@pytest.mark.parametrize("S", [3, 8, 12])
def test_the_embedded_sizes(S):
    tokenizer = random_tokenizer(TOKENIZERS["demo"])
    codes = random_codes(tokenizer.config, 2)
    images, _ = decoded(ready(tokenizer, codes), [3, 4], S)
    expected = tokenizer.decode(codes, seeds=[3, 4], num_steps=S)
    assert (images - expected).norm() <= 1e-5 * expected.norm()


@given(data=st.data())
def test_a_mix_of_requests(tiny_pipeline, data):
    tokenizer = tiny_pipeline.tokenizer
    B = data.draw(st.integers(1, 5), label="requests")
    codes = random_codes(tokenizer.config, B, data.draw(st.integers(0, 99)))
    deterministic = data.draw(st.booleans(), label="deterministic")
    with launchers(data.draw(st.booleans(), label="graphs"), B, B + 1) as launcher:
        diffusion = ready(tokenizer, codes, B + 1, deterministic=deterministic, launcher=launcher)
        step_at_random(diffusion, codes, data)


def step_at_random(diffusion, codes, data):
    """Requests that start, step and stop as drawn, each then held to its own decoding."""
    tokenizer, B = diffusion.tokenizer, len(codes)
    diffusion.slots.x[B].fill_(math.nan)  # of nobody
    diffusion.slots.previous.fill_(math.nan)  # what a slot's last request left
    S = data.draw(st.lists(st.sampled_from(STEPS), min_size=B, max_size=B), label="S")
    solvers = data.draw(st.lists(st.sampled_from(SOLVERS), min_size=B, max_size=B))
    starts = [data.draw(st.integers(0, s - 1)) for s in S]
    stops = [data.draw(st.integers(a + 1, s)) for a, s in zip(starts, S, strict=True)]
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=B, max_size=B))
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(B)) * 2 - 1
    for slot in range(B):
        given_image = image if starts[slot] else None
        diffusion.start(
            slot, seeds[slot], init_image=given_image, step=starts[slot], num_steps=S[slot]
        )
    last = {}
    step = list(starts)
    while any(step[s] < stops[s] for s in range(B)):
        active = [s for s in range(B) if step[s] < stops[s]]
        chosen = data.draw(st.lists(st.sampled_from(active), min_size=1, unique=True))
        previews = diffusion.step(
            [StepRow(slot=s, step=step[s], num_steps=S[s], solver=solvers[s]) for s in chosen]
        )
        last |= dict(zip(chosen, previews, strict=True))
        for s in chosen:
            step[s] += 1
    for s in range(B):
        settings = {"num_steps": S[s], "solver": solvers[s], "start_step": starts[s]}
        if starts[s]:
            settings["init_image"] = image[None]
        alone = codes[s : s + 1], None, [seeds[s]]
        close(last[s], tokenizer.decode(*alone, stop_after=stops[s], **settings)[0])
        if stops[s] == S[s]:
            close(diffusion.image(s), tokenizer.decode(*alone, **settings)[0])


def test_the_noise_is_the_plain_one(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    diffusion = Diffusion(tokenizer, SlotState(tokenizer, 2))
    diffusion.start(1, 77)
    assert torch.equal(diffusion.slots.x[1], tokenizer.noise([77], 1)[0])
    assert torch.equal(diffusion.image(1), diffusion.slots.x[1] / tokenizer.config.dit.data_std)


def test_bf16_is_as_exact_as_the_plain_path(fresh_pipeline):
    tokenizer = fresh_pipeline.tokenizer
    codes, seeds = random_codes(tokenizer.config, 3), [1, 2, 3]
    truth = copy.deepcopy(tokenizer).double().decode(codes, seeds=seeds)
    tokenizer.bfloat16()
    plain = tokenizer.decode(codes, seeds=seeds)
    images, _ = decoded(ready(tokenizer, codes), seeds, 4)
    assert images.dtype == torch.float32
    assert (images - truth).norm() <= 2 * (plain - truth).norm()


def test_time_embeddings_are_made_once_for_a_number_of_steps(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    diffusion = ready(tokenizer, random_codes(tokenizer.config, 2))
    calls = []
    block = tokenizer.pixel_dit.blocks[0]
    hook = block.time_embed.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    decoded(diffusion, [0, 1], 4)
    decoded(diffusion, [2, 3], 4)
    decoded(diffusion, [4, 5], 3)
    hook.remove()
    assert calls == [4, 3]


@torch.no_grad()
def test_time_tables_of_many_steps(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    diffusion = Diffusion(tokenizer, SlotState(tokenizer, 1))
    S = 2 * TABLE_STEPS + 5
    times = tokenizer.trajectory(tokenizer.noise(0, 1), S).times
    for step in (0, TABLE_STEPS - 1, TABLE_STEPS, S - 1):
        expected = torch.cat(list(tokenizer.pixel_dit.times(torch.tensor([times[step]]))))
        close(diffusion._time(step, S), expected)
    for num_steps in range(1, 2 * TABLES):
        diffusion._time(0, num_steps)
    assert len(diffusion._tables) == TABLES


def test_nothing_is_read_on_the_host(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    diffusion = ready(tokenizer, random_codes(tokenizer.config, 3))
    depth, D = tokenizer.config.dit.depth, tokenizer.config.dit.dim
    ids = torch.tensor([2, 0])
    with NoHostReads():
        diffusion.condition(ids, torch.tensor([0, 4]))
        times = torch.randn(depth, 2, D)
        t, next_t = torch.tensor([0.1, 0.5]), torch.tensor([0.2, 1.0])
        diffusion.evaluate(ids, times, t, next_t, torch.tensor([True, False]))
    with pytest.raises(AssertionError, match="reads from the device"), NoHostReads():
        float(t[0])


def test_nothing_can_be_read_on_the_host():
    config = ONE_CODE_A_GROUP
    with FakeTensorMode(), prefer("torch"):  # tensors that have no values
        tokenizer = Tokenizer(config)
        diffusion = Diffusion(tokenizer, SlotState(tokenizer, 3))
        ids, t = torch.empty(2, dtype=torch.int64), torch.empty(2)
        diffusion.condition(ids, ids)
        diffusion.evaluate(
            ids, torch.empty(config.dit.depth, 2, config.dit.dim), t, t, torch.empty(2).bool()
        )
        with pytest.raises(DataDependentOutputException):
            float(t[0])


def test_graphs_by_batch_pad_with_a_row_of_nobody(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    codes, seeds = random_codes(tokenizer.config, 3), [1, 2, 3]
    with launchers(True, 4, 4) as launcher:
        diffusion = ready(tokenizer, codes, 4, launcher=launcher)
        images, _ = decoded(diffusion, seeds, 4)
    close(images, tokenizer.decode(codes, seeds=seeds))
    graphs = {(graph.name, graph.bucket) for graph in launcher.report()}
    groups = {(f"extend {group}", 4) for group in range(4)}
    assert graphs == {*groups, ("conditions", 4), ("step", 4)}
    assert not diffusion.slots.x[3].any() and diffusion.slots.x[4].any()  # 4: nobody's


class Recorder:
    """Fills batches up to four; keeps the slots of every call."""

    def __init__(self):
        self.slots = []

    def size(self, rows):
        return max(4, rows)

    def __call__(self, key, work, inputs):
        self.slots.append((key, inputs[0].tolist()))
        work(*inputs)


def test_a_batch_is_filled_up_with_the_row_that_pads(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    codes, recorder = random_codes(tokenizer.config, 2), Recorder()
    diffusion = ready(tokenizer, codes, 5, launcher=recorder)
    images, _ = decoded(diffusion, [1, 2], 1)
    close(images, tokenizer.decode(codes, seeds=[1, 2], num_steps=1))
    keys = [("extend", group, 4) for group in range(4)] + [("conditions", 4), ("step", 4)]
    assert recorder.slots == [(key, [0, 1, 5, 5]) for key in keys]


def test_a_used_slot(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    first, second = random_codes(tokenizer.config, 2).split(1)
    diffusion = ready(tokenizer, first)
    decoded(diffusion, [1], 1)  # reads group 0, as the next one does first
    extend_all(Conditions(tokenizer, diffusion.slots), second, [0])
    for steps in (3, 4):  # the second time with the conditions there are
        images, _ = decoded(diffusion, [2], steps)
        close(images, tokenizer.decode(second, seeds=[2], num_steps=steps))


def test_what_does_not_fit(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    slots = SlotState(tokenizer, 2)
    diffusion = Diffusion(tokenizer, slots)
    diffusion.start(0, 1)
    slots.codes.copy_(random_codes(slots.config, 3))
    with pytest.raises(ValueError, match=r"conditions of group 0 for step 0 of slot 0"):
        diffusion.step(rows([0], 0, 4))
    Conditions(tokenizer, slots).extend(0, [0])
    with pytest.raises(ValueError, match=r"step: expected 0, the next of slot 0"):
        diffusion.step(rows([0], 1, 4))
    before = slots.x.clone()
    diffusion.start(1, 2)
    with pytest.raises(ValueError, match=r"conditions of group 0 for step 0 of slot 1"):
        diffusion.step(rows([0, 1], 0, 4))
    assert torch.equal(slots.x[0], before[0])  # nobody's step was taken
    diffusion.step(rows([0], 0, 1))
    with pytest.raises(ValueError, match=r"step: expected 1, .* below num_steps 1, got 1"):
        diffusion.step(rows([0], 1, 1))
    for wrong in ([], [2], [0, 0]):
        with pytest.raises(ValueError, match="distinct"):
            diffusion.step(rows(wrong, 0, 4))
    with pytest.raises(ValueError, match="distinct"):
        diffusion.image(-1)
    with pytest.raises(ValueError, match="seeds"):
        diffusion.start(0, -1)
    image = torch.zeros(3, 16, 16)
    for options in ({"step": 1}, {"init_image": image}, {"init_image": image, "step": 4}):
        with pytest.raises(ValueError, match="step: expected one in"):
            diffusion.start(0, 1, **options)
    with pytest.raises(ValueError, match="images: expected"):
        diffusion.start(0, 1, init_image=image[:, 1:], step=1)
