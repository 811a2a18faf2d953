"""Bad input: exit status 2 or 1, one line on stderr, nothing half-written."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dar_fast.pipeline import DARPipeline

Dar = Callable[..., Any]


BAD_USAGE = {
    "no command": ((), "expected a command, got none"),
    "unknown command": (("smaple",), "got 'smaple'; did you mean 'sample'?"),
    "unknown option": (("sample", "--stps", "3"), "--stps, 3; did you mean --steps?"),
    "value missing": (("sample", "--seed"), "--seed"),
    "not an integer": (("sample", "--seed", "x"), "--seed: expected an integer, got 'x'"),
    "steps not an integer": (("sample", "--steps", "2.5"), "--steps: expected an integer"),
    "not a number": (("sample", "--top-p", "x"), "--top-p: expected a number, got 'x'"),
    "label missing": (("preview",), "expected LABEL, got none"),
    "labels apart": (("sample", "a", "--seed", "1", "b"), "before the options, got 'b' apart"),
    "unknown solver": (("sample", "--solver", "x"), "expected one of 'adams2', 'euler', got 'x'"),
    "unknown dtype": (
        ("sample", "--dtype", "int8"),
        "one of 'bfloat16', 'float16', 'float32', got 'int8'",
    ),
    "no pictures": (("encode",), "expected at least one IMAGE, got none"),
    "no target": (("convert", "x.pt"), "expected SRC and DST, got 1 path"),
    "zero pictures": (("sample", "-n", "0"), "n: expected an integer >= 1, got 0"),
    "negative scale": (("sample", "--scale", "-1"), "scale: expected an integer >= 1, got -1"),
    "guidance unread": (("sample", "--guidance", "1:2:3"), "guidance: expected a number or FIRST"),
    "temperature unread": (
        ("sample", "--temperature", "x"),
        "temperature: expected a number, or one a group",
    ),
    "zero batch": (("sample", "--batch-size", "0"), "batch-size: expected an integer >= 1, got 0"),
    "out no PNG": (("sample", "--out", "x.jpg"), "out: expected a name that ends in .png"),
    "animation no WebP": (("sample", "--animate", "x.gif"), "animate: expected a name that ends"),
    "converted to a file": (("convert", "a", "b.pt", "--to", "ours"), "DST: expected the name of"),
}


@pytest.mark.parametrize(("argv", "text"), BAD_USAGE.values(), ids=BAD_USAGE.keys())
def test_bad_usage_is_refused_before_any_work(dar: Dar, argv: Any, text: str, here: Path) -> None:
    done = dar(*argv)
    assert done.status == 2
    assert done.err.startswith("dar: error: ") and done.err.count("\n") == 1
    assert text in done.err
    assert not list(here.iterdir())


BAD_VALUES = {
    "unknown label": (("sample", "noto/cat-fase"), "did you mean 'noto/cat-face'"),
    "class out of range": (("sample", "6"), "expected ids in [0, 6), got 6"),
    "NaN guidance": (("sample", "--guidance", "nan"), "guidance_scale: expected a finite number"),
    "infinite guidance": (("sample", "--guidance", "1:inf"), "guidance_scale: expected a finite"),
    "guidance of other groups": (
        ("sample", "--guidance", "1,2,3"),
        "guidance_scale: expected 4 values, one a group, got 3",
    ),
    "infinite temperature of a group": (
        ("sample", "--temperature", "1,1,1,inf"),
        "temperature: expected 0 or a number",
    ),
    "top_p 0": (("sample", "--top-p", "0"), "top_p: expected a number in (0, 1], got 0.0"),
    "top_p above 1": (("sample", "--top-p", "1.5"), "top_p: expected a number in (0, 1], got 1.5"),
    "top_p NaN": (("sample", "--top-p", "nan"), "top_p: expected a number in (0, 1], got nan"),
    "negative top_k": (("sample", "--top-k", "-1"), "top_k: expected an integer >= 0, got -1"),
    "negative temperature": (
        ("sample", "--temperature", "-1"),
        "temperature: expected 0 or a number",
    ),
    "zero steps": (("sample", "--steps", "0"), "steps: expected an integer in [1, 10000], got 0"),
    "negative steps": (("sample", "--steps", "-3"), "expected an integer in [1, 10000], got -3"),
    "negative seed": (("sample", "--seed", "-1"), "seeds: expected integers in [0, 2^63), got -1"),
    "seed too large": (("sample", "--seed", str(2**63)), "seeds: expected integers in [0, 2^63)"),
    "device unknown": (("sample", "--device", "abacus"), "device: expected one"),
    "device without values": (("sample", "--device", "meta"), "device: expected one"),
    "prefix too long": (
        ("restyle", "cat.png", "--labels", "hotel", "--prefix-groups", "5"),
        "prefix-groups: expected an integer in [0, 4], got 5",
    ),
    "prefix negative": (
        ("restyle", "cat.png", "--labels", "hotel", "--prefix-groups", "-1"),
        "prefix-groups: expected an integer in [0, 4], got -1",
    ),
    "restyled as unknown": (("restyle", "cat.png", "--labels", "x"), "expected one of 6 label"),
    "zero steps decoding": (("reconstruct", "cat.png", "--steps", "0"), "steps: expected an integ"),
    "groups out of range": (("decode", "x.dar", "--groups", "5"), "groups: expected an integer in"),
    "no label matches": (("labels", "zebra"), "expected part of one of 6 label names, got 'zebra'"),
}


@pytest.mark.parametrize(("argv", "text"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_bad_values_are_usage(
    dar: Dar, model: str, argv: Any, text: str, picture: Path, here: Path
) -> None:
    Path("x.dar").write_bytes(bytes(12))
    before = sorted(here.iterdir())
    done = dar(*argv, "--model", model)
    assert done.status == 2, done
    assert done.err.startswith("dar: error: ") and done.err.count("\n") == 1
    assert text in done.err
    assert sorted(here.iterdir()) == before


def damage(here: Path, model: str) -> None:
    """A corrupt picture, code files that do not fit, and a model whose weights stop early."""
    Path("corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    Path("text.png").write_text("not a picture")
    Path("short.dar").write_bytes(bytes(5))
    Path("empty.dar").write_bytes(b"")
    for part in ("prior", "tokenizer"):
        (here / "cut" / part).mkdir(parents=True)
        for file in Path(model, part).iterdir():
            (here / "cut" / part / file.name).write_bytes(file.read_bytes())
    index = Path(model, "model_index.json").read_bytes()
    (here / "cut" / "model_index.json").write_bytes(index)
    weights = here / "cut" / "prior" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


FAILURES = {
    "no picture": (("encode", "nope.png"), "nope.png: No such file"),
    "corrupt picture": (("encode", "corrupt.png"), "corrupt.png: expected a picture, got"),
    "text for a picture": (("reconstruct", "cat.png", "text.png"), "text.png: expected a picture"),
    "folder for a picture": (("encode", "cut"), "cut: Is a directory"),
    "no code file": (("decode", "nope.dar"), "expected a code file, got 'nope.dar'"),
    "short code file": (("decode", "short.dar"), "expected a multiple of 12 bytes"),
    "empty code file": (("decode", "empty.dar"), "got an empty file"),
    "no folder to write to": (("sample", "--out", "no/s.png"), "expected an existing folder"),
    "info of nothing": (("info", "nope"), "nope: no such file or folder"),
    "info of text": (("info", "text.png"), "text.png"),
    "convert nothing": (("convert", "nope.pt", "out"), "nope.pt: cannot be read"),
    "convert text": (("convert", "text.png", "out"), "text.png"),
}


@pytest.mark.parametrize(("argv", "text"), FAILURES.values(), ids=FAILURES.keys())
def test_failures_are_one_line_and_leave_nothing(
    dar: Dar, model: str, argv: Any, text: str, picture: Path, here: Path
) -> None:
    damage(here, model)
    before = sorted(here.rglob("*"))
    needs_model = argv[0] not in ("info", "convert")
    done = dar(*argv, *(("--model", model) if needs_model else ()))
    assert done.status == 1, done
    assert done.err.startswith("dar: error: ") and done.err.count("\n") == 1
    assert text in done.err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [("cut", "model.safetensors"), ("nope", "nope: expected a pipeline folder")],
    ids=["truncated", "missing"],
)
def test_a_model_that_cannot_be_read(
    dar: Dar, model: str, name: str, text: str, here: Path
) -> None:
    damage(here, model)
    done = dar("sample", "--model", name)
    assert done.status == 1 and text in done.err and done.err.count("\n") == 1
    assert not Path("samples.png").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ("sample", "hotel"),
        ("sample", "hotel", "--animate", "s.webp"),
        ("preview", "hotel"),
        ("restyle", "cat.png", "--labels", "hotel"),
        ("reconstruct", "cat.png"),
        ("encode", "cat.png"),
        ("decode", "x.dar"),
    ],
    ids=lambda argv: " ".join(argv),
)
def test_a_full_disk_leaves_nothing_behind(
    dar: Dar, model: str, argv: Any, picture: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("x.dar").write_bytes(bytes(12))
    before = sorted(here.iterdir())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dar_fast.files.os.fsync", full)
    done = dar(*argv, "--model", model)
    assert done.status == 1
    assert done.err.count("\n") == 1 and "No space left on device" in done.err
    assert re.search(r"expected to write '[\w.]+', got: ", done.err)
    assert sorted(here.iterdir()) == before


def test_an_old_sheet_survives_a_full_disk(
    dar: Dar, model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dar("sample", "hotel", "--model", model)
    old = Path("samples.png").read_bytes()

    def full(self: Image.Image, file: Any, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    assert dar("sample", "hotel", "--seed", 1, "--model", model).status == 1
    assert [path.name for path in here.iterdir()] == ["samples.png"]
    assert Path("samples.png").read_bytes() == old


def test_an_interruption_is_130(
    dar: Dar, model: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DARPipeline, "stream", interrupt)
    done = dar("sample", "--model", model)
    assert done.status == 130 and done.err == "dar: error: interrupted\n"
    assert not list(here.iterdir())
