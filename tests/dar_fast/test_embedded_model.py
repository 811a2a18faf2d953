"""The embedded model: it is there, it fits the package, and it does what its card says."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dar_fast
from dar_fast import DARPipeline
from dar_fast.images import psnr

FOLDER = Path(dar_fast.__file__).parent / "assets" / "demo"
HELD_OUT = Path(__file__).parents[1] / "golden" / "emoji_held_out.npz"


@pytest.fixture(scope="module")
def demo():
    return DARPipeline.from_pretrained("demo", device="cpu")


@pytest.fixture(scope="module")
def held_out():
    """Pictures [32, 3, 32, 32] in [-1, 1], and their label names."""
    with np.load(HELD_OUT) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, file["labels"].tolist()


def test_files():
    assert (FOLDER / "README.md").is_file()
    sizes = [file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()]
    assert sum(sizes) <= 32_000_000


def test_labels_are_styles_and_subgroups(demo):
    assert len(demo.labels) == 391
    styles = {name.split("/")[0] for name in demo.labels}
    assert styles == {"noto", "fluent-3d", "fluent-flat", "twemoji"}
    assert demo.get_label_ids(["cat face"]) == [min(demo.labels[s + "/cat-face"] for s in styles)]


def test_held_out_pictures_come_back(demo, held_out):
    images, _ = held_out
    codes = demo.tokenizer.encode(images)
    rebuilt = demo.tokenizer.decode(codes)
    assert len(codes.unique()) > 400
    scores = psnr(rebuilt, images)
    assert sum(scores) / len(scores) >= 17.5


def test_previews_come_nearer(demo, held_out):
    images, _ = held_out
    codes = demo.tokenizer.encode(images)
    errors = [
        float((demo.tokenizer.decode(codes, stop_after=k) - images).square().mean())
        for k in (1, 3, 8)
    ]
    assert errors == sorted(errors, reverse=True)


def test_the_prior_knows_the_held_out_pictures_better_than_chance(demo, held_out):
    images, names = held_out
    codes = demo.tokenizer.encode(images)
    labels = torch.tensor(demo.get_label_ids(names))
    wrong = labels.roll(7)
    with torch.no_grad():
        losses = [
            float(torch.nn.functional.cross_entropy(demo.prior(codes, y).mT, codes))
            for y in (labels, wrong)
        ]
    assert losses[0] < losses[1] < np.log(demo.prior.config.vocab_size)


def test_samples_are_of_their_request_alone(demo):
    labels = ["noto/cat-face", "twemoji/food-fruit", "fluent-3d/heart"]
    together = demo(labels, seeds=[3, 4, 5], output_type="pt")
    for i, label in enumerate(labels):
        alone = demo(label, seeds=[3 + i], output_type="pt")
        assert torch.equal(alone.codes[0], together.codes[i])
        torch.testing.assert_close(alone.images[0], together.images[i], atol=1e-3, rtol=0)
    corners = together.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert float(corners.mean()) > 0.8  # emoji stand on white
    assert float(together.images.std()) > 0.1
