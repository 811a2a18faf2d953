"""Prior.loss against the cross-entropy of the logits: dropout, precisions, torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from dar_fast.config import PriorConfig
from dar_fast.models import Prior

CONFIG = PriorConfig(dim=32, depth=2, heads=2, vocab_size=40, num_tokens=8, num_classes=3)


@pytest.fixture
def prior():
    torch.manual_seed(0)
    model = Prior(CONFIG, dropout=0.3)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


def inputs():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, CONFIG.vocab_size, (3, 8), generator=generator)
    return codes, torch.tensor([0, 2, CONFIG.null_class])


def loss_of_logits(model, codes, labels, reduction="mean"):
    logits = model(codes, labels)
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction=reduction)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [True, False], ids=["dropout", "eval"])
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16", "autocast"])
def test_is_that_of_the_logits(prior, training, precision):
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    prior.to(dtype).train(training)
    results = []
    for way in (prior.loss, lambda *a: loss_of_logits(prior, *a)):
        torch.manual_seed(2)  # the same dropout
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            loss = way(*inputs())
        results.append({"loss": loss.detach().clone(), **gradients(prior, loss)})
    ours, plain = results  # the logits are fp32, whatever the dtype of the model
    assert ours["loss"].dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert ours.keys() == plain.keys()
    low = precision in ("bf16", "autocast")
    for name in ours:
        difference = (ours[name] - plain[name]).double().norm()
        assert difference <= (2e-2 if low else 1e-6) * plain[name].double().norm(), name


def test_dropout_is_for_training(prior):
    codes, labels = inputs()
    first, second = (prior.train().loss(codes, labels) for _ in range(2))
    assert first != second
    first, second = (prior.eval().loss(codes, labels) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("reduction", ["sum", "none"])
@torch.no_grad()
def test_reductions(prior, reduction):
    prior.eval()
    expected = loss_of_logits(prior, *inputs(), reduction)
    torch.testing.assert_close(prior.loss(*inputs(), reduction=reduction), expected)


def test_compiles(prior):
    prior.eval()
    compiled = torch.compile(prior.loss, backend="aot_eager", fullgraph=True)
    loss = compiled(*inputs())
    torch.testing.assert_close(loss, prior.loss(*inputs()))
    ours, eager = gradients(prior, loss), gradients(prior, prior.loss(*inputs()))
    torch.testing.assert_close(ours, eager)


def test_inputs_are_checked(prior):
    codes, labels = inputs()
    with pytest.raises(ValueError, match="codes: expected int64"):
        prior.loss(codes.int(), labels)
    with pytest.raises(ValueError, match=r"codes: expected values in \[0, 40\), got "):
        prior.loss(codes.clamp_min(1) * 40, labels)
    with pytest.raises(ValueError, match="labels: expected int64"):
        prior.loss(codes, labels[:2])
    with pytest.raises(ValueError, match="reduction"):
        prior.loss(codes, labels, reduction="mode")
