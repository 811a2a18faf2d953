"""Arguments of the front door: what fits is drawn, what does not is refused before any work."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_fast import DARPipeline
from dar_fast.flow import SOLVERS
from dar_fast.images import OUTPUT_TYPES
from dar_fast.models import Prior, Tokenizer

N, Q, K, V, CLASSES = 16, 4, 4, 64, 6  # of the tiny pipeline


@pytest.fixture(scope="module")
def idle_pipeline(tiny_pipeline: DARPipeline) -> DARPipeline:
    """One that fails where it starts to work."""

    def work(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("work was started")

    pipe = DARPipeline(Prior(tiny_pipeline.prior.config), tiny_pipeline.tokenizer, list("abcdef"))
    pipe._frames = work  # type: ignore[method-assign]
    return pipe


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"class_labels": 6}, ValueError, r"class_labels: expected ids in \[0, 6\), got 6"),
    ({"class_labels": "x"}, ValueError, "class_labels: expected one of 6 label names, got 'x'"),
    ({"class_labels": []}, ValueError, "class_labels: expected at least one"),
    ({"class_labels": 0.5}, TypeError, "class_labels: expected names or integer ids"),
    ({"class_labels": torch.tensor([0.5])}, ValueError, "class_labels: expected int64"),
    ({"class_labels": torch.tensor([[0]])}, ValueError, "class_labels: expected int64"),
    ({"seeds": -1}, ValueError, "seeds: expected integers in"),
    ({"seeds": 2**63}, ValueError, "seeds: expected integers in"),
    ({"seeds": 2**63 - 1}, ValueError, "seeds: expected integers in"),  # the second of two
    ({"seeds": [1]}, ValueError, "seeds: expected 2, one a picture, got 1"),
    ({"seeds": [1, 2, 3]}, ValueError, "seeds: expected 2"),
    ({"seeds": [1, 2.5]}, ValueError, "seeds: expected integers"),
    ({"seeds": torch.tensor([1.0, 2.0])}, ValueError, "seeds: expected integers"),
    ({"seeds": "ab"}, ValueError, "seeds: expected integers"),
    ({"seeds": 1.0}, TypeError, "seeds: expected integers, got float"),
    ({"guidance_scale": math.nan}, ValueError, "guidance_scale: expected a finite number"),
    ({"guidance_scale": math.inf}, ValueError, "guidance_scale"),
    ({"guidance_scale": (1.0, math.nan)}, ValueError, "guidance_scale"),
    ({"guidance_scale": (1.0, 2.0, 3.0)}, ValueError, "guidance_scale"),
    ({"guidance_scale": "4"}, ValueError, "guidance_scale"),
    ({"guidance_scale": None}, ValueError, "guidance_scale"),
    ({"temperature": -0.1}, ValueError, "temperature: expected 0 or a number in .*, got -0.1"),
    ({"temperature": 1e-300}, ValueError, "temperature"),
    ({"temperature": 10**400}, ValueError, "temperature"),
    ({"guidance_scale": 1e300}, ValueError, "guidance_scale"),
    ({"temperature": math.nan}, ValueError, "temperature"),
    ({"temperature": math.inf}, ValueError, "temperature"),
    ({"temperature": "1"}, ValueError, "temperature"),
    ({"top_k": -1}, ValueError, "top_k: expected an integer >= 0, got -1"),
    ({"top_k": 1.5}, ValueError, "top_k"),
    ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
    ({"top_p": 1.01}, ValueError, "top_p"),
    ({"top_p": math.nan}, ValueError, "top_p"),
    (
        {"num_inference_steps": 0},
        ValueError,
        r"num_inference_steps: expected an integer in \[1, 10000\]",
    ),
    ({"num_inference_steps": -8}, ValueError, "num_inference_steps: .* got -8"),
    ({"num_inference_steps": 2**70}, ValueError, "num_inference_steps"),
    ({"num_inference_steps": 8.0}, TypeError, "num_inference_steps: expected an integer, got fl"),
    ({"num_inference_steps": True}, TypeError, "num_inference_steps"),
    ({"solver": "heun"}, ValueError, r"solver: expected one of \['adams2', 'euler'\], got 'heun'"),
    ({"solver": None}, ValueError, "solver"),
    ({"prefix_codes": torch.zeros(2, 17, dtype=torch.int64)}, ValueError, "at most 16 codes, got"),
    ({"prefix_codes": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"int64 \[2, P\] or"),
    ({"prefix_codes": torch.zeros(2, 2, 2, dtype=torch.int64)}, ValueError, "prefix_codes: exp"),
    ({"prefix_codes": torch.tensor(1)}, ValueError, "prefix_codes: expected int64"),
    ({"prefix_codes": torch.zeros(2, 4)}, ValueError, "prefix_codes: expected int64"),
    ({"prefix_codes": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, "got torch.int32"),
    ({"prefix_codes": torch.tensor([0, 64])}, ValueError, r"values in \[0, 64\), got 64"),
    ({"prefix_codes": torch.tensor([-1, 64])}, ValueError, r"values in \[0, 64\), got -1"),
    ({"prefix_codes": [1, 2]}, TypeError, "prefix_codes: expected a tensor, got list"),
    ({"num_groups": 0}, ValueError, r"num_groups: expected an integer in \[1, 4\], got 0"),
    ({"num_groups": 5}, ValueError, "num_groups"),
    ({"num_groups": 2.0}, TypeError, "num_groups: expected an integer, got float"),
    ({"output_type": "jpeg"}, ValueError, "output_type: expected one of .* got 'jpeg'"),
    ({"output_type": 3}, ValueError, "output_type"),
    ({"output_type": []}, ValueError, "output_type"),
    ({"callback_on_step_end": 3}, TypeError, "callback_on_step_end: expected a callable, got int"),
    ({"size": 3}, TypeError, "size"),
]


@pytest.mark.parametrize("method", ["__call__", "stream"])
@pytest.mark.parametrize(("wrong", "kind", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments(
    idle_pipeline: DARPipeline, method: str, wrong: dict[str, Any], kind: Any, message: str
) -> None:
    arguments = {"class_labels": [0, 1], **wrong}
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message) as caught:
        getattr(idle_pipeline, method)(**arguments)  # a stream is refused before its first event
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_settings_are_keywords(idle_pipeline: DARPipeline) -> None:
    with pytest.raises(TypeError, match="positional"):
        idle_pipeline([0], 3)  # type: ignore[misc]


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(-2, 100), max_size=3),
    st.tuples(st.floats(), st.floats()),
    st.builds(lambda n: torch.full((n,), n), st.integers(0, 3)),
    st.builds(lambda n: np.full(n, 0.5), st.integers(0, 3)),
    st.builds(object),
)
NAMES = [
    "class_labels", "seeds", "guidance_scale", "temperature", "top_k", "top_p",
    "num_inference_steps", "solver", "prefix_codes", "num_groups", "output_type",
    "callback_on_step_end",
]  # fmt: skip


@settings(max_examples=200)
@given(arguments=st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3))
def test_anything_is_taken_or_refused_in_one_line(
    idle_pipeline: DARPipeline, arguments: dict[str, Any]
) -> None:
    try:
        stream = idle_pipeline.stream(**{"class_labels": [0, 1], "seeds": 0, **arguments})
    except (ValueError, TypeError) as error:
        text = str(error)
        assert len(text.splitlines()) == 1
        assert text.partition(":")[0] in arguments or "seeds: expected" in text
        assert "expected" in text
    else:
        with pytest.raises(AssertionError, match="work was started"):
            next(stream)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments that fit the tiny pipeline."""
    B = draw(st.integers(1, 3))
    scale = st.floats(-1, 10)
    arguments: dict[str, Any] = {
        "class_labels": draw(st.lists(st.integers(0, CLASSES - 1), min_size=B, max_size=B)),
        "seeds": draw(st.lists(st.integers(0, 2**63 - 1), min_size=B, max_size=B)),
        "guidance_scale": draw(st.one_of(scale, st.tuples(scale, scale))),
        "temperature": draw(st.one_of(st.just(0), st.floats(1e-3, 100))),
        "top_k": draw(st.integers(0, 2 * V)),
        "top_p": draw(st.floats(0, 1, exclude_min=True)),
        "num_inference_steps": draw(st.one_of(st.none(), st.integers(1, 9))),
        "solver": draw(st.sampled_from(SOLVERS)),
        "num_groups": draw(st.one_of(st.none(), st.integers(1, K))),
        "output_type": draw(st.sampled_from(OUTPUT_TYPES)),
    }
    if draw(st.booleans()):
        P = draw(st.integers(0, N))
        prefix = torch.randint(V, (B, P), generator=torch.Generator().manual_seed(P))
        arguments["prefix_codes"] = prefix
    return arguments


@settings(max_examples=25)
@given(arguments=requests())
def test_whatever_fits_is_drawn(tiny_pipeline: DARPipeline, arguments: dict[str, Any]) -> None:
    out = tiny_pipeline(**arguments)
    B, columns = len(arguments["seeds"]), Q * (arguments["num_groups"] or K)
    assert out.seeds == arguments["seeds"]
    assert out.codes.dtype == torch.int64
    assert out.codes.shape == (B, columns)
    assert 0 <= int(out.codes.min()) <= int(out.codes.max()) < V
    prefix = arguments.get("prefix_codes")
    if prefix is not None:
        shared = min(prefix.shape[1], columns)
        assert torch.equal(out.codes[:, :shared], prefix[:, :shared])
    if arguments["output_type"] == "codes":
        assert out.images is None
        return
    pictures = [np.asarray(image) for image in out.images]
    high = 255 if arguments["output_type"] == "pil" else 1
    assert len(pictures) == B
    assert all(np.isfinite(p).all() and 0 <= p.min() <= p.max() <= high for p in pictures)
    alone = {**arguments, "class_labels": arguments["class_labels"][-1:], "seeds": out.seeds[-1:]}
    if prefix is not None:
        alone["prefix_codes"] = prefix[-1]
    again = tiny_pipeline(**alone)
    assert torch.equal(again.codes[0], out.codes[-1])
    tolerance = 1 if high == 255 else 1e-4
    np.testing.assert_allclose(np.asarray(again.images[0], float), pictures[-1], atol=tolerance)


def test_parts_that_do_not_fit(tiny_pipeline: DARPipeline) -> None:
    prior, tokenizer = tiny_pipeline.prior, tiny_pipeline.tokenizer
    with pytest.raises(TypeError, match="prior: expected a Prior, got Tokenizer"):
        DARPipeline(tokenizer, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tokenizer: expected a Tokenizer, got NoneType"):
        DARPipeline(prior, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels: expected 6 names"):
        DARPipeline(prior, tokenizer, ["a"])
    wide = Prior(dataclasses.replace(prior.config, vocab_size=128))
    with pytest.raises(ValueError, match="prior: expected the tokenizer's 16 tokens of 64 codes"):
        DARPipeline(wide, tokenizer)
    elsewhere = Tokenizer(tokenizer.config).to("meta")
    with pytest.raises(ValueError, match="tokenizer: expected the prior's device cpu, got meta"):
        DARPipeline(prior, elsewhere)


def test_label_ids(tiny_pipeline: DARPipeline) -> None:
    assert tiny_pipeline.labels["noto/hotel"] == 4
    assert tiny_pipeline.get_label_ids(["noto/hotel", 2, "cat face"]) == [4, 2, 0]
    with pytest.raises(ValueError, match="did you mean 'noto/hotel'"):
        tiny_pipeline.get_label_ids(["noto/hotels"])
    out = tiny_pipeline(["Noto/Hotel"], seeds=1, output_type="codes")
    assert torch.equal(out.codes, tiny_pipeline(4, seeds=1, output_type="codes").codes)
