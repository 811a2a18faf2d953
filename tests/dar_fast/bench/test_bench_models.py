"""What is timed: random weights without zeros, an unpacked copy of no more memory, plain runs."""

import math

import pytest
import torch

from dar_fast.bench.models import Plain, Spec, random_model, randomise, unpacked
from dar_fast.bench.plain import plain_draw, plain_frames
from dar_fast.checkpoint import CheckpointError
from dar_fast.config import PRIORS, TOKENIZERS
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.layers import Linear, pack
from dar_fast.pipeline import DARPipeline
from dar_kernels import prefer
from dar_kernels.linear import packs

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [Prior, Tokenizer])
def test_random_models_are_seeded_and_have_no_zero_weight(kind, tiny_pipeline: DARPipeline):
    config = (tiny_pipeline.prior if kind is Prior else tiny_pipeline.tokenizer).config
    one, two = (random_model(kind, config, torch.bfloat16, CPU) for _ in range(2))
    assert not one.training
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and p.device == CPU and p.count_nonzero(), name
        assert torch.equal(p, q), name
        of_a_norm = p.ndim == 1 and name.endswith("weight")
        assert (p == 1).all() if of_a_norm else p.float().std() > 0.01, name


def test_random_models_draw_many_codes_and_finite_pictures(tiny_pipeline: DARPipeline):
    prior = random_model(Prior, tiny_pipeline.prior.config, torch.float32, CPU)
    tokenizer = random_model(Tokenizer, tiny_pipeline.tokenizer.config, torch.float32, CPU)
    codes = prior.generate(torch.arange(4), seeds=0)
    assert len(codes.unique()) > 8
    pictures = tokenizer.decode(codes, seeds=0)
    assert pictures.isfinite().all() and pictures.std() > 0


def test_randomise_leaves_no_zero_parameter(tiny_pipeline: DARPipeline):
    model = Prior(tiny_pipeline.prior.config)
    norms = model.norm.weight.clone()
    randomise(model)
    assert all(p.count_nonzero() for p in model.parameters())
    assert torch.equal(model.norm.weight, norms)


def test_an_unpacked_copy_shares_the_weights_and_nothing_packed(fresh_pipeline: DARPipeline):
    tokenizer = fresh_pipeline.to(dtype=torch.bfloat16).tokenizer
    pack(tokenizer)
    plain = unpacked(tokenizer)
    theirs = dict(tokenizer.named_parameters())
    for name, p in plain.named_parameters():
        assert p.data_ptr() == theirs[name].data_ptr(), name
    linears = [m for m in plain.modules() if isinstance(m, Linear)]
    assert linears and all(m.packed is None for m in linears)
    if packs(tokenizer.pixel_dit.conv_in.weight):
        assert tokenizer.pixel_dit.conv_in.packed is not None


def test_the_plain_path_draws_the_pipeline_s_pictures(tiny_pipeline: DARPipeline):
    plain = Plain(prior=tiny_pipeline.prior, tokenizer=unpacked(tiny_pipeline.tokenizer))
    with prefer("torch"):
        frames = list(plain_frames(plain, [1, 3]))
    expected = tiny_pipeline([1, 3], seeds=0, guidance_scale=4.0, output_type="codes")
    assert torch.equal(frames[-1].codes, expected.codes)
    pictures = tiny_pipeline.tokenizer.decode(expected.codes, seeds=0)
    torch.testing.assert_close(frames[-1].estimate, pictures, rtol=1e-4, atol=1e-4)


def test_a_plain_run_says_when_its_first_preview_came(tiny_pipeline: DARPipeline):
    plain = Plain(prior=tiny_pipeline.prior, tokenizer=unpacked(tiny_pipeline.tokenizer))
    took = plain_draw(plain, [0])
    assert 0 < took.first_preview < took.seconds and math.isfinite(took.seconds)


def test_subjects_by_name():
    subject = Spec(device="cpu").load()
    assert subject.weights == "fp32" and subject.kv_itemsize == 4
    assert subject.prior.config == PRIORS["demo"]
    labels = subject.labels(16)
    assert len(set(labels)) == 16 and max(labels) < subject.prior.config.num_classes
    random = Spec(prior="demo", tokenizer="demo", device="cpu").load()
    assert random.weights == "bf16" and random.kv_itemsize == 2
    assert random.plain.prior is random.prior and random.plain.tokenizer is not random.tokenizer


def test_sizes_are_known_without_the_weights(tiny_pipeline: DARPipeline, tmp_path):
    assert Spec(prior="7B", tokenizer="v1").configs() == (PRIORS["7B"], TOKENIZERS["v1"])
    assert Spec().configs() == (PRIORS["demo"], TOKENIZERS["demo"])
    tiny_pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    configs = tiny_pipeline.prior.config, tiny_pipeline.tokenizer.config
    assert Spec(model=str(tmp_path)).configs() == configs
    (tmp_path / "prior").rename(tmp_path / "p")
    (tmp_path / "tokenizer").rename(tmp_path / "prior")
    (tmp_path / "p").rename(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="expected a prior and a tokenizer, got others"):
        Spec(model=str(tmp_path)).configs()


@pytest.mark.parametrize(
    ("prior", "tokenizer", "text"),
    [
        ("M", "v1", "prior: expected one of B, L, .*got 'M'"),
        ("demo", "v3", "tokenizer: expected one of v1, lite, demo, got 'v3'"),
        ("demo", "lite", "expected the tokenizer's 256 tokens"),
    ],
)
def test_presets_that_are_none_or_do_not_fit(prior, tokenizer, text):
    with pytest.raises(ValueError, match=text):
        Spec(prior=prior, tokenizer=tokenizer, device="cpu").load()
