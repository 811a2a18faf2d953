"""The classifier learns what is plain to see; the report holds its figures; errors are clear."""

import json
from dataclasses import replace

import pytest
import torch

from dar_fast import DARPipeline
from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.models import Prior, Tokenizer
from dar_train.classifier import Classifier, split_label, train_classifier
from dar_train.curves import draw_metrics
from dar_train.data import load_pictures, to_float
from dar_train.evaluate import EvaluateRecipe, evaluate
from dar_train.figures import previews, psnr, psnr_of_mean
from dar_train.recipes import ClassifierRecipe


@pytest.fixture
def recipe(pictures, tmp_path) -> ClassifierRecipe:
    return ClassifierRecipe(
        data=pictures, out=tmp_path / "run", steps=2, batch=8, warmup=0, size=16, width=8,
        precision="fp32", device="cpu", ema=0.5, lr=1e-2,
    )  # fmt: skip


def test_learns_a_plain_difference(tmp_path, recipe) -> None:
    from PIL import Image

    for style, shade in (("light", 200), ("dark", 30)):
        for i in range(10):
            folder = tmp_path / "plain" / style
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (shade + i,) * 3).save(folder / f"{i}.png")
    recipe = replace(recipe, data=tmp_path / "plain", steps=30)
    assert train_classifier(recipe)
    data = load_pictures(recipe.data, 16)
    trained = Classifier.load(recipe.out / "classifier")
    figures = trained.accuracy(to_float(data.images), data.labels)
    assert figures == {"style": 1.0, "subgroup": 1.0, "both": 1.0}


def test_labels_split_at_the_last_slash() -> None:
    assert split_label("noto/cat-face") == ("noto", "cat-face")
    assert split_label("cat") == ("", "cat")
    model = Classifier(["a/x", "b/x", "b/y"], width=8, size=16)
    assert (model.styles, model.subgroups) == (["a", "b"], ["x", "y"])
    assert model.style_of.tolist() == [0, 1, 1]
    assert model.subgroup_of.tolist() == [0, 0, 1]


def test_bad_classifier_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="classifier: expected a trained one in"):
        Classifier.load(tmp_path)
    (tmp_path / "config.json").write_text('{"width": 8}')
    with pytest.raises(ValueError, match="classifier: expected a trained one in"):
        Classifier.load(tmp_path)


@pytest.fixture
def pipeline(model_files, tmp_path) -> str:
    torch.manual_seed(0)
    with open(model_files["prior"]) as p, open(model_files["tokenizer"]) as t:
        prior = Prior(PriorConfig.from_dict(json.load(p)))
        tokenizer = Tokenizer(TokenizerConfig.from_dict(json.load(t)), 0.1)
    DARPipeline(prior, tokenizer, ["left", "right"]).save_pretrained(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_report(recipe, pipeline, pictures, tmp_path) -> None:
    train_classifier(recipe)
    report = evaluate(
        EvaluateRecipe(
            pipeline=pipeline, data=pictures, classifier=recipe.out / "classifier",
            out=tmp_path / "report", samples=4, device="cpu",
            runs=(recipe.out,),
        )
    )  # fmt: skip
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == report
    assert [p["groups"] for p in report["tokenizer"]["previews"]] == [1, 2, 3, 4]
    assert set(report["tokenizer"]["psnr_by_style"]) == {""}
    # an untrained head gives every code the same probability
    assert report["prior"]["cross_entropy"] == pytest.approx(torch.tensor(32.0).log().item())
    assert set(report["classifier"]) == {"held_out", "reconstructions", "samples"}
    assert report["pictures"] == {
        "train": 18, "held_out": 2, "held_out_names": 2, "styles": [""]
    }  # fmt: skip
    assert report["models"]["num_groups"] == 4
    (run,) = report["runs"]
    assert (run["kind"], run["step"], len(run["calls"])) == ("classifier", 2, 1)
    assert run["recipe"]["batch"] == 8
    # two flat dark squares on white are two dimensions of position and colour, not one
    assert report["baselines"]["components"]["psnr"] > report["baselines"]["mean"]["psnr"]
    for name in ("reconstructions", "samples", "previews", "curves-run"):
        assert (tmp_path / "report" / f"{name}.png").stat().st_size > 0
    with pytest.raises(ValueError, match="expected the labels that the pipeline was trained on"):
        (tmp_path / "other" / "up").mkdir(parents=True)
        for i in range(2):
            source = pictures / "left" / f"{i}.png"
            (tmp_path / "other" / "up" / f"{i}.png").write_bytes(source.read_bytes())
        evaluate(EvaluateRecipe(pipeline=pipeline, data=tmp_path / "other", samples=0))


def test_previews_end_at_the_decoded_picture(pipeline) -> None:
    tokenizer = DARPipeline.from_pretrained(pipeline).tokenizer
    codes = torch.arange(16).view(2, 8)
    seen = previews(tokenizer, codes, [0, 1])
    assert len(seen) == 5
    torch.testing.assert_close(seen[-1], tokenizer.decode(codes, seeds=[0, 1]))
    torch.testing.assert_close(seen[1], tokenizer.decode(codes, seeds=[0, 1], stop_after=2))


def test_psnr_of_known_errors() -> None:
    images = torch.zeros(2, 3, 4, 4)
    rebuilt = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.02)])
    torch.testing.assert_close(psnr(images, rebuilt), torch.tensor([20.0, 40.0]).double())
    assert psnr_of_mean(images, rebuilt) == pytest.approx(22.967, abs=1e-3)
    assert float(psnr(images, images)[0]) == 60.0


def test_curves_need_json_lines(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="curves: expected JSON lines in"):
        draw_metrics(tmp_path / "metrics.jsonl", tmp_path / "out.png")
