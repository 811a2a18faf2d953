"""Conditions over slots: any order of requests gives what the whole sequence gives."""

import pytest
import torch
from diffusion_helpers import (
    ONE_CODE_A_GROUP,
    NoHostReads,
    extend_all,
    launchers,
    random_codes,
    random_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.config import TOKENIZERS
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.slots import NO_GROUP, SlotState

SLOTS = 5


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@given(data=st.data())
def test_requests_at_different_groups(tiny_pipeline, data):
    tokenizer = tiny_pipeline.tokenizer
    slots = SlotState(tokenizer, SLOTS)
    with launchers(data.draw(st.booleans()), SLOTS, SLOTS) as launcher:
        conditions = Conditions(tokenizer, slots, data.draw(st.booleans()), launcher)
        codes = extend_at_random(conditions, data)
    with torch.no_grad():
        close(slots.conditions[:SLOTS], tokenizer.conditions(codes))


def extend_at_random(conditions, data):
    """All groups of random codes, in batches of whoever is at one group."""
    slots, config = conditions.slots, conditions.slots.config
    slots.codes[:SLOTS] = codes = random_codes(config, SLOTS, data.draw(st.integers(0, 99)))
    while any(done < config.num_groups for done in slots.extended):
        group = data.draw(st.sampled_from([g for g in slots.extended if g < config.num_groups]))
        ready = [s for s in range(SLOTS) if slots.extended[s] == group]
        chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, unique=True))
        others = [s for s in range(SLOTS) if s not in chosen]
        before = slots.conditions[others].clone(), slots.cache.keys[:, others].clone()
        conditions.extend(group, chosen)
        assert torch.equal(slots.conditions[others], before[0])
        assert torch.equal(slots.cache.keys[:, others], before[1])
    return codes


def test_the_embedded_sizes():
    config = TOKENIZERS["demo"]
    tokenizer = random_tokenizer(config)
    conditions = Conditions(tokenizer, SlotState(tokenizer, 3))
    codes = random_codes(config, 2)
    extend_all(conditions, codes, (2, 0))
    with torch.no_grad():
        close(conditions.slots.conditions[[2, 0]], tokenizer.conditions(codes))


def test_drawing_a_group_again_undoes_what_follows(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    slots = SlotState(tokenizer, 2)
    conditions = Conditions(tokenizer, slots)
    first, second = random_codes(slots.config, 2)
    extend_all(conditions, first[None], [1])
    again = slots.conditions[1].clone()
    conditions.extend(3, [1])
    assert torch.equal(slots.conditions[1], again)
    Q = slots.config.group_size
    slots.codes[1, 2 * Q :] = second[2 * Q :]
    slots.group[1] = 2
    conditions.extend(2, [1])
    assert slots.extended[1] == 3 and slots.group[1] == NO_GROUP
    conditions.extend(3, [1])
    with torch.no_grad():
        mixed = torch.cat((first[: 2 * Q], second[2 * Q :]))
        close(slots.conditions[1], tokenizer.conditions(mixed[None])[0])


def test_a_new_request_in_a_used_slot(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    conditions = Conditions(tokenizer, SlotState(tokenizer, 1))
    extend_all(conditions, random_codes(tokenizer.config, 1, 1), [0])
    codes = random_codes(tokenizer.config, 1, 2)
    extend_all(conditions, codes, [0])
    with torch.no_grad():
        close(conditions.slots.conditions[:1], tokenizer.conditions(codes))


def test_what_does_not_fit(tiny_pipeline):
    conditions = Conditions(tiny_pipeline.tokenizer, SlotState(tiny_pipeline.tokenizer, 2))
    conditions.extend(0, [0])
    with pytest.raises(ValueError, match=r"expected at most 0, the next one of slot 1, got 1"):
        conditions.extend(1, [0, 1])
    assert conditions.slots.extended == [1, 0]
    for group in (-1, 4):
        with pytest.raises(ValueError, match=r"group: expected an integer in \[0, 4\)"):
            conditions.extend(group, [0])
    with pytest.raises(ValueError, match="distinct"):
        conditions.extend(0, [1, 1])


def test_nothing_is_read_on_the_host(tiny_pipeline):
    conditions = Conditions(tiny_pipeline.tokenizer, SlotState(tiny_pipeline.tokenizer, 3))
    ids = torch.tensor([2, 0])
    with NoHostReads():
        for group in range(4):
            conditions.compute(group, ids)


def test_nothing_can_be_read_on_the_host():
    tokenizer = random_tokenizer(ONE_CODE_A_GROUP).to("meta")  # has no values
    conditions = Conditions(tokenizer, SlotState(tokenizer, 3))
    for group in range(4):
        conditions.compute(group, torch.empty(2, dtype=torch.int64, device="meta"))


def test_a_failure_leaves_the_group_to_be_done(tiny_pipeline, monkeypatch):
    tokenizer = tiny_pipeline.tokenizer
    slots = SlotState(tokenizer, 2)
    conditions = Conditions(tokenizer, slots, deterministic=True)
    slots.codes[:2] = codes = random_codes(slots.config, 2)
    conditions.extend(0, [0, 1])
    compute, calls = conditions.compute, []

    def failing(group, ids):
        calls.append(group)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        compute(group, ids)

    monkeypatch.setattr(conditions, "compute", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        conditions.extend(1, [0, 1])
    assert slots.extended == [2, 1]
    for group in (1, 2, 3):
        conditions.extend(group, [0, 1])
    with torch.no_grad():
        close(slots.conditions[:2], tokenizer.conditions(codes))
