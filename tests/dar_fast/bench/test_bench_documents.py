"""Latency and throughput of a tiny model: what the documents say, their lines, and their plots."""

import json
import math
from copy import deepcopy

import pytest
import torch
from PIL import Image

from dar_fast.bench import measure, plot
from dar_fast.bench.floors import codes_bytes, picture_floor, step_flops
from dar_fast.bench.latency import latency
from dar_fast.bench.models import make_subject
from dar_fast.bench.report import latency_lines, throughput_lines
from dar_fast.bench.throughput import throughput
from dar_kernels import native

QUANTISED = ("int8",) if native.missing() is None else ()


@pytest.fixture(scope="module", autouse=True)
def _small_products():
    """A matrix of the probes' size takes a second on one busy core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SIDES", {"cpu": 128, "cuda": 128})
        yield


@pytest.fixture(scope="module")
def subject(tiny_pipeline):
    prior, tokenizer = (
        deepcopy(part).to(torch.bfloat16) for part in (tiny_pipeline.prior, tiny_pipeline.tokenizer)
    )
    return make_subject("tiny", prior, tokenizer)


@pytest.fixture(scope="module")
def one(subject):
    return latency(subject, quantised=QUANTISED, turns=2, budget=60, say=lambda _: None)


@pytest.fixture(scope="module")
def many(subject):
    return throughput(
        subject, quantised=(), requests=3, batches=[1, 2], rate=50.0, arrivals=5, turns=1,
        budget=60, say=lambda _: None,
    )  # fmt: skip


KINDS = ["bf16", *QUANTISED]


@pytest.mark.parametrize("key", ["seconds", "plain_seconds", "floor_seconds", "ratio"])
def test_latency_has_a_figure_a_kind_of_weights(one, key):
    assert list(one[key]) == KINDS
    assert all(0 < value < math.inf for value in one[key].values())


def test_latency_compares_with_the_plain_path_of_the_same_run(one):
    plain = {row["part"]: row["seconds"] for row in one["rows"]}["picture, plain eager"]
    for kind in KINDS:
        assert one["plain_seconds"][kind] == plain
        assert one["ratio"][kind] == plain / one["seconds"][kind]
    assert one["turns"] == 2
    for row in one["rows"]:
        assert len(row["all_seconds"]) == (12 if row["part"] == "codes, first group" else 2)


def test_latency_rows_stand_beside_floors_of_the_measured_ceilings(one, subject):
    prior, tokenizer = subject.prior.config, subject.tokenizer.config
    for row in one["rows"]:
        kind = row["weights"]
        floor = picture_floor(
            prior, tokenizer, kind, bandwidth=one["read_bandwidth"][kind], rate=one["matrix_rate"]
        )
        expected = {
            "picture": floor.overlapped, "codes alone": floor.codes,
            "codes, first group": floor.group,
            "pixel DiT alone": floor.steps,
        }.get(row["part"], floor.sequential)  # fmt: skip
        assert row["floor_seconds"] == pytest.approx(expected)
        assert row["of_floor"] == pytest.approx(expected / row["seconds"])
        if row["part"] == "codes alone":
            rate = codes_bytes(prior, kind) / row["seconds"]
            assert row["of_bandwidth"] == pytest.approx(rate / one["read_bandwidth"][kind])
        if row["part"] == "pixel DiT alone":
            rate = tokenizer.num_steps * step_flops(tokenizer) / row["seconds"]
            assert row["of_rate"] == pytest.approx(rate / one["matrix_rate"])
    parts = [row["part"] for row in one["rows"]]
    assert parts.count("picture") == parts.count("codes alone") == len(KINDS)


def test_first_previews_come_before_the_picture(one, many):
    for kind in KINDS:
        assert 0 < one["first_preview_seconds"][kind] < one["seconds"][kind]
        assert one["first_preview_floor_seconds"][kind] < one["floor_seconds"][kind]
    assert 0 < many["first_preview_seconds"] < many["alone_seconds"]


def test_throughput_compares_with_one_by_one_and_one_batch(many):
    assert [row["batch"] for row in many["rows"]] == [1, 2]
    for row in many["rows"]:
        assert row["pictures_a_second"] == pytest.approx(3 / row["seconds"])
        assert row["ratio_one_by_one"] == many["plain_one_by_one_seconds"] / row["seconds"]
        assert row["ratio_batch"] == many["plain_batch_seconds"] / row["seconds"]
    last = many["rows"][-1]
    assert last["ratio_not_overlapped"] == many["not_overlapped_seconds"] / last["seconds"]
    assert "ratio_not_overlapped" not in many["rows"][0]
    assert many["best"]["pictures_a_second"] == max(r["pictures_a_second"] for r in many["rows"])


def test_everyone_who_comes_is_served(many):
    queue = many["queue"]
    assert queue["count"] == 5 and queue["refused"] == 0 and queue["rate"] == 50.0
    assert queue["latency_seconds"]["p50"] <= queue["latency_seconds"]["p99"]
    assert queue["latency_seconds"]["p50"] > many["first_preview_seconds"] / 10


def test_documents_are_strict_json_and_say_where_they_come_from(one, many):
    for document in (one, many):
        text = json.dumps(document, allow_nan=False)
        assert "\n" not in text and json.loads(text) == document
        assert {"device", "commit", "versions", "threads"} <= set(document)


def test_lines_state_the_floor_and_the_ratio(one, many):
    lines = latency_lines(one)
    for row in one["rows"]:
        (line,) = (ln for ln in lines if ln.startswith(f"{row['part']} | {row['weights']} "))
        assert f"floor {row['floor_seconds']:9.4f} s" in line and f"{row['seconds']:9.4f} s" in line
    text = "\n".join(throughput_lines(many))
    assert "plain one by one" in text and "plain in a batch" in text and "p99" in text


@pytest.mark.parametrize("which", ["one", "many"])
def test_plots_are_pictures(which, request, tmp_path):
    document = request.getfixturevalue(which)
    plot.save_plot(document, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(2**24)) > 3
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        plot.check_matplotlib()
