"""Order and draws without state, pixels, augmentation."""

import numpy as np
import pytest
import torch

from dar_train.data import (
    Augmentation,
    Order,
    augment,
    derived_seed,
    to_float,
    to_uint8,
    uniforms,
)

STILL = Augmentation(flip=0.0, affine=0.0, permute=0.0, jitter=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(B: int = 6, R: int = 16) -> torch.Tensor:
    images = torch.ones(B, 3, R, R)
    images[:, :, 4:12, 5:11] = torch.rand(B, 3, 8, 6, generator=generator(1)) * 2 - 1
    return images


def test_order_visits_everything_once_an_epoch() -> None:
    order = Order(torch.arange(100, 110), seed=3)
    first, second = order.take(0, 10), order.take(10, 10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100, 110))
    assert first.tolist() != second.tolist()


def test_order_depends_on_position_only() -> None:
    order = Order(torch.arange(7), seed=3)
    whole = order.take(0, 50)
    parts = [Order(torch.arange(7), seed=3).take(start, 5) for start in range(0, 50, 5)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, Order(torch.arange(7), seed=4).take(0, 50))


def test_order_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order(torch.arange(0), seed=0)


def test_derived_seeds_differ() -> None:
    seeds = {derived_seed(seed, a, b) for seed in range(3) for a in range(3) for b in range(5)}
    assert len(seeds) == 45
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uniforms_depend_on_the_position_only() -> None:
    whole = uniforms(5, 0, 40, 3)
    parts = [uniforms(5, start, 8, 3) for start in range(0, 40, 8)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, uniforms(6, 0, 40, 3))
    many = uniforms(5, 10**12, 4000, 3)
    assert 0 <= many.min() < 0.01
    assert 0.99 < many.max() < 1
    np.testing.assert_allclose(many.mean(axis=0), 0.5, atol=0.02)


def test_bytes_round_trip() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = to_float(images)
    assert float(floats.min()) == -1.0
    assert float(floats.max()) == 1.0
    assert torch.equal(to_uint8(floats), images)


def test_augment_off_is_the_identity() -> None:
    images = picture()
    torch.testing.assert_close(augment(images, generator(), STILL), images, atol=1e-5, rtol=0)


def test_augment_flip_mirrors() -> None:
    images = picture()
    flipped = augment(images, generator(), STILL._replace(flip=1.0))
    torch.testing.assert_close(flipped, images.flip(-1), atol=1e-5, rtol=0)


def test_augment_is_a_function_of_the_generator() -> None:
    images = picture()
    a, b, c = (augment(images, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_augment_stays_in_range_on_white_and_keeps_most_ink() -> None:
    images = picture(64)
    out = augment(images, generator(2))
    assert float(out.min()) >= -1 - 1e-5
    assert float(out.max()) <= 1 + 1e-5
    corners = out[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, torch.ones_like(corners))
    before, after = (1 - images).sum(dim=(1, 2, 3)), (1 - out).sum(dim=(1, 2, 3))
    assert float((after / before).min()) > 0.4
    assert float((after / before).max()) < 1.6


def test_augment_shift_is_bounded() -> None:
    images = torch.ones(200, 3, 32, 32)
    images[:, :, 15:17, 15:17] = -1
    out = augment(images, generator(), STILL._replace(affine=1.0, scale=0.0, rotation=0.0))
    ink = (1 - out[:, 0]) / (1 - out[:, 0]).sum(dim=(1, 2), keepdim=True)
    rows = (ink.sum(dim=2) * torch.arange(32)).sum(dim=1) - 15.5
    assert 2.0 < float(rows.abs().max()) <= 3.0 + 1e-3


def test_permuted_channels_keep_the_values() -> None:
    images = picture(32)
    out = augment(images, generator(), STILL._replace(permute=1.0))
    torch.testing.assert_close(out.sort(dim=1).values, images.sort(dim=1).values, atol=1e-5, rtol=0)
    assert not torch.allclose(out, images, atol=1e-3)
