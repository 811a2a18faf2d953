"""Solver steps: the same bits whoever is in the batch, where asked for, and after a failure."""

import pytest
import torch
from diffusion_helpers import (
    ONE_CODE_A_GROUP,
    SMALL_BF16,
    decoded,
    random_codes,
    random_tokenizer,
    ready,
    rows,
)

from dar_fast.models.pixel_dit import DiTBlock


def differing(config, dtype, deterministic):
    """Pixels of five pictures that differ between each alone and all in a batch."""
    tokenizer = random_tokenizer(config, dtype)
    codes, seeds = random_codes(config, 5), list(range(5))
    together, previews = decoded(ready(tokenizer, codes, deterministic=deterministic), seeds, 4)
    count = 0
    for i in range(5):
        alone = ready(tokenizer, codes[i : i + 1], deterministic=deterministic)
        image, preview = decoded(alone, seeds[i : i + 1], 4)
        count += int((image[0] != together[i]).sum())
        count += int((torch.cat(preview) != torch.stack(previews)[:, i]).sum())
    return count


KINDS = {
    "fp32": (ONE_CODE_A_GROUP, torch.float32),
    "bf16": (SMALL_BF16, torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_pictures_are_equal_bit_by_bit(kind):
    assert differing(*KINDS[kind], deterministic=True) == 0


@pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="which products depend on the batch is known of MKL and oneDNN",
)
@pytest.mark.parametrize("kind", KINDS)
def test_without_it_a_batch_shows(kind):
    if kind == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no bf16 products here")
    assert differing(*KINDS[kind], deterministic=False) > 0


@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_that_failed_are_run_again(tiny_pipeline, monkeypatch, deterministic):
    tokenizer = tiny_pipeline.tokenizer
    codes, seeds = random_codes(tokenizer.config, 3), [1, 2, 3]
    expected, _ = decoded(ready(tokenizer, codes, deterministic=deterministic), seeds, 4)
    diffusion = ready(tokenizer, codes, deterministic=deterministic)
    calls = []
    velocity = tokenizer.pixel_dit.velocity

    def failing(*inputs):
        calls.append(1)
        if len(calls) % 3 == 2:
            raise RuntimeError("out of memory")
        return velocity(*inputs)

    monkeypatch.setattr(tokenizer.pixel_dit, "velocity", failing)
    for slot, seed in enumerate(seeds):
        diffusion.start(slot, seed)
    failures = 0
    for i in range(4):
        while True:
            try:
                previews = diffusion.step(rows(range(3), i, 4))
                break
            except RuntimeError:
                failures += 1
        assert torch.equal(diffusion.step(rows(range(3), i, 4)), previews)  # already taken
    assert failures
    assert torch.equal(torch.stack([diffusion.image(s) for s in range(3)]), expected)


def test_a_failure_between_blocks_does_not_leave_half_a_group(tiny_pipeline, monkeypatch):
    tokenizer = tiny_pipeline.tokenizer
    codes = random_codes(tokenizer.config, 1)
    diffusion = ready(tokenizer, codes)
    diffusion.start(0, 9)
    method, calls = DiTBlock.condition, []

    def failing(self, cond):
        calls.append(1)
        if len(calls) == 4:  # the second block of the second group
            raise RuntimeError("out of memory")
        return method(self, cond)

    monkeypatch.setattr(DiTBlock, "condition", failing)
    diffusion.step(rows([0], 0, 4))
    with pytest.raises(RuntimeError):
        diffusion.step(rows([0], 1, 4))
    for i in (1, 2, 3):
        diffusion.step(rows([0], i, 4))
    expected = tokenizer.decode(codes, seeds=[9])[0]
    torch.testing.assert_close(diffusion.image(0), expected, atol=2e-5, rtol=0)
