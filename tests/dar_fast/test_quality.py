"""What one byte a weight costs: reports by their definitions, bounds of the embedded model."""

import copy
import math

import pytest
import torch

from dar_fast import DARPipeline
from dar_fast.quality import compare_next_codes, compare_quantized, compare_runs, quality_report
from dar_fast.quantization import quantize_prior, stored_quantization


@pytest.fixture(scope="module")
def demo():
    """The embedded prior, and codes that it draws for four classes."""
    prior = DARPipeline.from_pretrained("demo", device="cpu").prior
    labels = torch.tensor([7, 100, 200, 300])
    return prior, labels, prior.generate(labels, seeds=0)


# Guided by 4; measured over 64 pictures: KL 1.5e-4 and 2.5e-3 nats a code, at most 0.024 and 0.17,
# the same likeliest code at 99.3 % and 96.0 % of positions (of four pictures at least 98.8, 94.9).
@pytest.mark.parametrize(
    ("kind", "mean_kl", "max_kl", "agreement"),
    [("int8", 5e-4, 0.05, 0.97), ("fp8", 8e-3, 0.4, 0.9)],
)
def test_what_one_byte_costs_the_embedded_model(demo, kind, mean_kl, max_kl, agreement):
    prior, labels, codes = demo
    candidate = copy.deepcopy(prior)
    quantize_prior(candidate, kind)
    found = compare_next_codes(prior, candidate, codes, labels)
    assert 0 < found.mean_kl < mean_kl
    assert found.mean_kl < found.max_kl < max_kl
    assert agreement < found.agreement < 1


def test_reports_leave_the_pipeline_as_it_is(tiny_pipeline):
    before = copy.deepcopy(tiny_pipeline.prior.state_dict())
    report = compare_quantized(tiny_pipeline, "int8", num_samples=2)
    assert 0 < report.next_codes.mean_kl < 1e-2
    assert report.bytes < report.reference_bytes
    assert stored_quantization(tiny_pipeline.prior) is None
    after = tiny_pipeline.prior.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_report_is_of_its_arguments_alone(tiny_pipeline):
    first = quality_report(tiny_pipeline, "int8", num_samples=3, seed=5, guidance_scale=(1.0, 3.0))
    assert first == quality_report(tiny_pipeline, "int8", 3, 5, (1.0, 3.0))
    assert first != quality_report(tiny_pipeline, "int8", 3, 6, (1.0, 3.0))
    assert first["quantization"] == "int8"
    assert first["next_codes"].keys() == {"mean_kl", "max_kl", "agreement"}


@torch.no_grad()
def test_divergence_is_what_its_definition_says(tiny_pipeline, fresh_pipeline):
    reference, prior = tiny_pipeline.prior, fresh_pipeline.prior
    quantize_prior(prior, "fp8")
    codes = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5])
    found = compare_next_codes(reference, prior, codes, labels, guidance_scale=1.0)
    p, q = (m(codes, labels).double().softmax(-1) for m in (reference, prior))
    kl = (p * (p / q).log()).sum(-1)
    assert math.isclose(found.mean_kl, float(kl.mean()), rel_tol=1e-6)
    assert math.isclose(found.max_kl, float(kl.max()), rel_tol=1e-6)
    assert found.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    guided = compare_next_codes(reference, prior, codes, labels, guidance_scale=4.0)
    assert guided.mean_kl > found.mean_kl
    none = compare_next_codes(reference, reference, codes, labels)
    assert none == (0.0, 0.0, 1.0)


def test_runs_are_compared_up_to_the_first_difference(tiny_pipeline):
    codes = torch.zeros(4, 16, dtype=torch.int64)
    others = codes.clone()
    others[1, 10] = others[1, 3] = 7
    others[2, 15] = 7
    runs = compare_runs(tiny_pipeline.tokenizer, codes, others, [4, 5, 6, 7])
    assert runs.equal_prefix == (16 + 3 + 15 + 16) / 4
    assert runs.equal_codes == 0.5
    pictures = [tiny_pipeline.tokenizer.decode(c, seeds=[4, 5, 6, 7]) for c in (codes, others)]
    a, b = (((p + 1) / 2).clamp(0, 1).double() for p in pictures)
    assert math.isclose(
        runs.psnr_db, -10 * math.log10(float((a - b).square().mean())), abs_tol=1e-3
    )
    assert compare_runs(tiny_pipeline.tokenizer, codes, codes, [1, 2, 3, 4]) == (16.0, 1.0, None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: quality_report(p, "int4"), ValueError, "expected one of"),
        (lambda p: quality_report(p, "int8", 0), ValueError, "num_samples: expected an integer >="),
        (lambda p: quality_report(p, "int8", 2.0), TypeError, "num_samples: expected an integer"),
        (lambda p: quality_report(p, "int8", 1, -1), ValueError, "seed: expected an integer >= 0"),
        (
            lambda p: compare_next_codes(
                p.prior, p.prior, torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0).long()
            ),
            ValueError,
            "codes: expected int64",
        ),
        (
            lambda p: compare_runs(p.tokenizer, torch.zeros(1, 16), torch.zeros(2, 16), [0]),
            ValueError,
            r"others: expected \[1, 16\], got \[2, 16\]",
        ),
    ],
)
def test_bad_arguments_of_reports(tiny_pipeline, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny_pipeline)


def test_a_quantised_prior_has_nothing_to_be_compared_with(fresh_pipeline):
    quantize_prior(fresh_pipeline.prior, "int8")
    with pytest.raises(ValueError, match="prior: expected weights before they were quantised"):
        quality_report(fresh_pipeline, "int8")
    with pytest.raises(ValueError, match="candidate: expected a prior of"):
        compare_next_codes(
            DARPipeline.from_pretrained("demo", device="cpu").prior,
            fresh_pipeline.prior,
            torch.zeros(1, 4, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
        )
