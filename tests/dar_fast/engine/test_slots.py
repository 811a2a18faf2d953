"""Slots: what they take, and what a fork copies."""

import pytest
import torch
from diffusion_helpers import extend_all, random_codes

from dar_fast.config import TOKENIZERS
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.slots import NO_GROUP, SlotState, slot_bytes, to_device


def tensors(slots):
    return {
        "codes": slots.codes, "conditions": slots.conditions, "keys": slots.cache.keys,
        "values": slots.cache.values, "x": slots.x, "previous": slots.previous,
        "preview": slots.preview, "group_keys": slots.group_keys,
        "group_values": slots.group_values,
    }  # fmt: skip


def row(slots, slot):
    """Everything a slot has."""
    rows = {
        name: tensor[slot] if len(tensor) == slots.slots + 1 else tensor[:, slot]
        for name, tensor in tensors(slots).items()
    }
    return {name: tensor.clone() for name, tensor in rows.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [1, 7])
def test_bytes_are_those_allocated(fresh_pipeline, count, dtype):
    tokenizer = fresh_pipeline.tokenizer.to(dtype)
    slots = SlotState(tokenizer, count)
    expected = {name: tensor.nbytes for name, tensor in tensors(slots).items()}
    assert slots.bytes == expected == slot_bytes(tokenizer.config, count, dtype)
    assert {t.dtype for n, t in tensors(slots).items() if n in ("x", "previous", "preview")} == {
        torch.float32
    }


def test_a_slot_of_the_published_tokenizer():
    one, two = (slot_bytes(TOKENIZERS["v1"], n, torch.bfloat16) for n in (1, 2))
    a_slot = {name: two[name] - one[name] for name in one}
    assert a_slot["group_values"] == 12 * 12 * 32 * 768 * 2
    assert a_slot["keys"] + a_slot["values"] == 2 * 8 * 256 * 768 * 2
    assert a_slot["x"] == a_slot["previous"] == a_slot["preview"] == 3 * 256 * 256 * 4
    assert sum(a_slot.values()) == pytest.approx(16.8e6, rel=0.01)


@pytest.mark.parametrize("groups", [0, 1, 3, 4])
def test_a_fork_goes_on_with_codes_of_its_own(tiny_pipeline, groups):
    tokenizer = tiny_pipeline.tokenizer
    Q, K = tokenizer.config.group_size, tokenizer.config.num_groups
    slots = SlotState(tokenizer, 3)
    conditions = Conditions(tokenizer, slots)
    codes = random_codes(tokenizer.config, 3)
    extend_all(conditions, codes, (0, 1, 2))
    slots.group[2] = 0
    source, other = row(slots, 0), row(slots, 1)
    slots.copy(0, 2, groups)
    assert slots.extended[2] == groups and slots.group[2] == NO_GROUP
    mixed = torch.cat((codes[0, : groups * Q], codes[2, groups * Q :]))
    assert torch.equal(slots.codes[2], mixed)
    for group in range(groups, K):
        conditions.extend(group, [2])
    with torch.no_grad():
        expected = tokenizer.conditions(mixed[None])[0]
    torch.testing.assert_close(slots.conditions[2], expected, atol=2e-5, rtol=0)
    for slot, before in ((0, source), (1, other)):
        after = row(slots, slot)
        assert all(torch.equal(after[name], before[name]) for name in before), slot


def test_a_fork_ahead_of_the_conditions_takes_the_codes(tiny_pipeline):
    slots = SlotState(tiny_pipeline.tokenizer, 2)
    codes = random_codes(slots.config, 1)
    slots.codes[:1] = codes
    Conditions(tiny_pipeline.tokenizer, slots).extend(0, [0])
    slots.copy(0, 1, 3)
    Q = slots.config.group_size
    assert slots.extended[1] == 1
    assert torch.equal(slots.codes[1, : 3 * Q], codes[0, : 3 * Q])
    assert torch.equal(slots.conditions[1, :Q], slots.conditions[0, :Q])


def test_what_does_not_fit(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizer
    with pytest.raises(ValueError, match=r"slots: expected an integer >= 1, got 0"):
        SlotState(tokenizer, 0)
    for wrong in (True, 2.0):
        with pytest.raises(TypeError, match=r"slots: expected an integer, got"):
            SlotState(tokenizer, wrong)
    slots = SlotState(tokenizer, 2)
    for ids in ([], [2], [-1], [0, 0]):
        with pytest.raises(ValueError, match=r"slots: expected distinct ones in \[0, 2\)"):
            slots.check(ids)
    with pytest.raises(ValueError, match="distinct"):
        slots.copy(1, 1, 0)
    for groups in (-1, 5):
        with pytest.raises(ValueError, match=r"groups: expected an integer in \[0, 4\]"):
            slots.copy(0, 1, groups)


def test_values_to_a_device():
    t = to_device([0.1, 1.0], torch.float32, torch.device("cpu"))
    assert t.dtype == torch.float32 and torch.equal(t, torch.tensor([0.1, 1.0]))
    assert to_device([2**62], torch.int64, torch.device("cpu")).tolist() == [2**62]
