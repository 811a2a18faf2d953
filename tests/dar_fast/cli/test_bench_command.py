"""`dar bench`: one JSON line, files written whole, and bad usage refused before any work."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar_fast.bench import measure, plot

Dar = Callable[..., Any]
ROOT = Path(__file__).parents[3]
TIMED = ["latency", "throughput", "memory"]


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of the probes' size takes a second on one busy core."""
    monkeypatch.setattr(measure, "SIDES", {"cpu": 128, "cuda": 128})


BAD_USAGE = {
    "no bench": (
        (),
        "bench: expected one of latency, throughput, memory, quality, train, got none",
    ),
    "unknown bench": (
        ("speed",),
        "bench: expected one of latency, throughput, memory, quality, train, got 'speed'",
    ),
    "prior alone": (("latency", "--prior", "L"), "expected --prior NAME, --tokenizer NAME and"),
    "no random weights": (
        ("memory", "--prior", "L", "--tokenizer", "v1"),
        "--random-weights together",
    ),
    "random weights of nothing": (("latency", "--random-weights"), "together, got some of them"),
    "model and presets": (
        ("latency", "--prior", "L", "--tokenizer", "v1", "--random-weights", "--model", "x"),
        "model: expected none beside --random-weights, got 'x'",
    ),
    "unknown preset": (
        ("latency", "--prior", "M", "--tokenizer", "v1", "--random-weights"),
        "prior: expected one of B, L, XL",
    ),
    "parts that do not fit": (
        ("latency", "--prior", "demo", "--tokenizer", "lite", "--random-weights"),
        "prior: expected the tokenizer's 256 tokens",
    ),
    "unknown weights": (("latency", "--quantised", "int4"), "int4"),
    "dtype": (("latency", "--dtype", "int8"), "expected one of 'bfloat16', 'float32', got 'int8'"),
    "device": (("latency", "--device", "abacus"), "device: expected one"),
    "zero requests": (("throughput", "--requests", "0"), "requests: expected integers >= 1"),
    "zero batch": (
        ("throughput", "--batch-sizes", "4", "0"),
        "batch-sizes: expected integers >= 1",
    ),
    "negative rate": (("throughput", "--rate", "-1"), "rate: expected a number > 0, got -1"),
    "infinite rate": (("throughput", "--rate", "inf"), "rate: expected a number > 0, got inf"),
    "no arrivals": (("throughput", "--arrivals", "0"), "arrivals: expected an integer >= 1, got 0"),
    "out no JSON": (("latency", "--out", "x.txt"), "out: expected a name that ends in .json"),
    "plot no PNG": (("latency", "--plot", "x.pdf"), "plot: expected a name that ends in .png"),
    "no budget": (("memory", "--budget-gb", "0"), "budget-gb: expected a number > 0, got 0"),
}


@pytest.mark.parametrize(("argv", "text"), BAD_USAGE.values(), ids=BAD_USAGE.keys())
def test_bad_usage_is_refused_before_any_work(dar: Dar, argv: Any, text: str, here: Path) -> None:
    done = dar("bench", *argv)
    assert done.status == 2, done
    assert done.err.startswith("dar: error: ") and done.err.count("\n") == 1
    assert text in done.err
    assert not list(here.iterdir())


FAILURES = {
    "no folder for out": (("--out", "no/x.json"), "out: expected an existing folder"),
    "no folder for plot": (("--plot", "no/x.png"), "plot: expected an existing folder"),
    "no model": (("--model", "nope"), "nope"),
}


@pytest.mark.parametrize("bench", TIMED)
@pytest.mark.parametrize(("argv", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_one_line(dar: Dar, bench: str, argv: Any, text: str, here: Path) -> None:
    done = dar("bench", bench, *argv)
    assert done.status == 1 and done.err.count("\n") == 1 and text in done.err
    assert not list(here.iterdir())


def test_help_names_the_benches_and_each_has_its_own(dar: Dar) -> None:
    overview = dar("bench", "--help")
    assert overview.status == 0
    assert re.findall(r"^  (\w+)  ", overview.out, re.M) == [*TIMED, "quality", "train"]
    assert "  bench " in dar("--help").out
    for name in TIMED:
        own = dar("bench", name, "--help")
        assert own.status == 0
        for flag in ("--json", "--out", "--plot", "--quick", "--random-weights", "--device"):
            assert flag in own.out


def test_a_missing_matplotlib_is_named_before_the_work(
    dar: Dar, monkeypatch: pytest.MonkeyPatch, here: Path
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    done = dar("bench", "latency", "--plot", "x.png", "--model", "nope")
    assert done.status == 1 and "plot: expected matplotlib" in done.err
    assert "pip install matplotlib" in done.err


@pytest.mark.parametrize("bench", ["latency", "throughput"])
def test_json_is_the_only_line(dar: Dar, model: str, bench: str, here: Path) -> None:
    options = ("--requests", "2", "--batch-sizes", "2", "--arrivals", "2")
    done = dar(
        "bench", bench, "--model", model, "--quick", "--json", "--out", "r.json",
        "--plot", "r.png", *(options if bench == "throughput" else ("--quantised", "int8")),
    )  # fmt: skip
    assert done.status == 0, done
    assert done.out.count("\n") == 1 and "turn 1 of 5" in done.err
    assert done.json["bench"] == bench and done.json["quick"] is True
    assert json.loads(Path("r.json").read_text()) == done.json
    assert sorted(p.name for p in here.iterdir()) == ["r.json", "r.png"]
    if bench == "latency":
        for key in ("seconds", "plain_seconds", "floor_seconds", "ratio"):
            assert set(done.json[key]) == {"fp32", "int8"}


def test_memory_is_planned_for_another_device(dar: Dar, here: Path) -> None:
    names = ("--prior", "XL", "--tokenizer", "v1", "--random-weights")
    plan = ("--plan-for", "cuda", "--budget-gb", "80", "--batch-sizes", "64")
    done = dar("bench", "memory", *names, *plan, "--json", "--plot", "m.png", "--device", "cpu")
    assert done.status == 0 and done.out.count("\n") == 1, done
    assert done.json["budget_bytes"] == 80e9 and done.json["planned_for"] == "cuda"
    assert 64 < done.json["largest_batch"]["int8"] < done.json["largest_batch"]["bf16"]
    assert [row["measured_bytes"] for row in done.json["rows"]] == [None, None]
    assert Path("m.png").read_bytes().startswith(b"\x89PNG")


def test_without_json_the_table_comes_first(dar: Dar, model: str) -> None:
    done = dar("bench", "latency", "--model", model, "--quick")
    *lines, last = done.out.splitlines()
    assert json.loads(last)["bench"] == "latency"
    assert any(line.startswith("codes alone | int8") and "floor" in line for line in lines)


@pytest.mark.parametrize("name", TIMED)
def test_scripts_are_the_command(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--out", "x.txt"],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "out: expected a name that ends in .json" in done.stderr
