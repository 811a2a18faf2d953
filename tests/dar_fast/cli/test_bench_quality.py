"""`dar bench quality`: its numbers are those of the library; bad usage is refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar_fast import DARPipeline
from dar_fast.quality import quality_report
from dar_fast.quantization import quantize_prior

Dar = Callable[..., Any]


@pytest.fixture
def model(tmp_path: Path, tiny_pipeline: DARPipeline) -> str:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_document_is_the_reports(dar: Dar, model: str, tiny_pipeline: DARPipeline) -> None:
    argv = ("--model", model, "--samples", "3", "--seed", "2", "--guidance", "1:3", "--json")
    done = dar("bench", "quality", *argv, "--device", "cpu")
    assert done.status == 0, done
    document = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert document["bench"] == "quality" and document["arithmetic"] == "float32"
    expected = [quality_report(tiny_pipeline, kind, 3, 2, (1.0, 3.0)) for kind in ("int8", "fp8")]
    assert document["rows"] == json.loads(json.dumps(expected))


def test_a_table_comes_before_the_document(dar: Dar, model: str) -> None:
    argv = ("--model", model, "--samples", "1", "--quantised", "int8")
    done = dar("bench", "quality", *argv)
    *lines, last = done.out.splitlines()
    assert [row["quantization"] for row in json.loads(last)["rows"]] == ["int8"]
    assert len(lines) == 11
    assert lines[0].split() == ["beside", "bf16", "int8"]


BAD_USAGE = {
    "no samples": (("--samples", "0"), "samples: expected an integer >= 1, got 0"),
    "seed": (("--seed", "-1"), "seed: expected an integer >= 0, got -1"),
    "guidance": (("--guidance", "much"), "guidance: expected"),
    "kind": (("--quantised", "int4"), "int4"),
    "no kind": (("--quantised",), "quantised: expected int8, fp8 or both, got none"),
}


@pytest.mark.parametrize(("argv", "text"), BAD_USAGE.values(), ids=BAD_USAGE.keys())
def test_bad_usage(dar: Dar, argv: Any, text: str) -> None:
    done = dar("bench", "quality", *argv)
    assert done.status == 2
    assert text in done.err and done.err.count("\n") == 1


def test_a_quantised_model_has_no_bf16(
    dar: Dar, fresh_pipeline: DARPipeline, tmp_path: Path
) -> None:
    quantize_prior(fresh_pipeline.prior, "int8")
    fresh_pipeline.save_pretrained(tmp_path / "small")
    done = dar("bench", "quality", "--model", str(tmp_path / "small"))
    assert done.status == 2
    assert "prior: expected weights before they were quantised" in done.err
