"""One command from pictures to a report, in calls that resume one another."""

import json

import pytest

from dar_fast import DARPipeline
from dar_train import demo
from dar_train.demo import STAGES, DemoRecipe, Stages, train_demo
from dar_train.recipes import ClassifierRecipe


@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_stages_fit_each_other_and_the_package(size) -> None:
    stages = STAGES[size]
    tokenizer, prior = stages.tokenizer.config(), stages.prior.config()
    assert (prior.vocab_size, prior.num_tokens) == (tokenizer.codebook_size, tokenizer.num_tokens)
    assert stages.classifier.size == tokenizer.image_size == {"cpu": 32, "gpu": 64}[size]


def test_calls_resume_one_another(
    tokenizer_recipe, prior_recipe, pictures, tmp_path, monkeypatch
) -> None:
    stages = Stages(
        tokenizer=tokenizer_recipe(steps=2),
        prior=prior_recipe(steps=2),
        classifier=ClassifierRecipe(steps=2, warmup=0, batch=8, size=16, width=8, precision="fp32"),
    )
    recipe = DemoRecipe(
        data=pictures, out=tmp_path / "demo", call_minutes=1e-9, device="cpu", samples=2
    )
    trained = []
    for name in ("train_tokenizer", "train_prior", "train_classifier"):
        inner = getattr(demo, name)
        monkeypatch.setattr(
            demo, name, lambda r, inner=inner, name=name: trained.append(name) or inner(r)
        )
    ended = [train_demo(recipe, stages) for _ in range(4)]
    assert ended == [False, False, False, True]
    assert trained == [
        "train_tokenizer", "train_tokenizer", "train_prior", "train_prior", "train_classifier",
        "train_classifier",
    ]  # fmt: skip
    assert (recipe.out / "finished").is_file()
    report = json.loads((recipe.out / "report" / "report.json").read_text())
    assert (report["pictures"]["train"], report["pictures"]["held_out"]) == (18, 2)
    card = (recipe.out / "pipeline" / "README.md").read_text()
    assert "- tokenizer: 2 steps" in card
    assert "![Tokenizer](curves-tokenizer.png)" in card
    assert (recipe.out / "pipeline" / "curves-tokenizer.png").is_file()
    assert list(DARPipeline.from_pretrained(recipe.out / "pipeline").labels) == ["left", "right"]


def test_bad_settings(tmp_path) -> None:
    with pytest.raises(ValueError, match="call_minutes: expected a positive number, got 0"):
        DemoRecipe(call_minutes=0)
    with pytest.raises(ValueError, match="data: expected a packed file"):
        train_demo(DemoRecipe(data=tmp_path / "none", out=tmp_path / "out"))
