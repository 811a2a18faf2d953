"""The random bits: the published answers, and a stream that is each request's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_kernels.philox import code_bits, gumbel, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (-1, (ONES,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    c0, c1 = (torch.tensor([c]) for c in counter[:2])
    bits = philox(torch.tensor([key]), c0, c1, *counter[2:])
    assert " ".join(f"{int(b):08x}" for b in bits) == expected


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), st.integers(0, 200))
def test_noise_is_a_function_of_seed_and_position(seeds, position):
    positions = torch.tensor([position, position + 1])
    batch = gumbel(code_bits(torch.tensor(seeds)[:, None], positions, 50))  # [B, 2, V]
    for row, seed in enumerate(seeds):
        for column in range(2):
            alone = gumbel(code_bits(torch.tensor(seed), positions[column], 50))
            assert torch.equal(batch[row, column], alone)
    assert batch.isfinite().all()
