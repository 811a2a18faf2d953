"""`dar labels`, `dar info`, `dar convert`, `dar doctor`: what is here, and in which form."""

import fnmatch
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from dar_fast.cli.options import MODEL, Json, ModelOptions, torch_dtype
from dar_fast.cli.report import say, say_json, table, working

LISTED = 6  # elements of a list that `dar info` shows
PNG = b"\x89PNG\r\n\x1a\n"
Form = Literal["ours", "official"]


def labels(
    pattern: Annotated[Positional[str], arg(metavar="[PATTERN]", help_behavior_hint="")] = "",
    *,
    model: OmitArgPrefixes[ModelOptions] = MODEL,
    json: Json = False,
) -> None:
    """List the label names of a model.

    Args:
        pattern: Part of a name, or a pattern with * and ?, such as 'noto/*'; without it, all names.
        json: Print one JSON document, name to id.
    """
    pipe = model.load()
    known = pipe.labels
    wanted = pattern.casefold()
    globbed = wanted if any(c in wanted for c in "*?[") else f"*{wanted}*"
    found = {name: i for name, i in known.items() if fnmatch.fnmatchcase(name.casefold(), globbed)}
    if known and not found:
        raise ValueError(
            f"pattern: expected part of one of {len(known)} label names, got {pattern!r}; "
            "dar labels lists them"
        )
    if json:
        say_json({"num_classes": pipe.prior.config.num_classes, "labels": found})
        return
    if not known:
        count = pipe.prior.config.num_classes
        say(f"{model.model} has no label names; its labels are the numbers 0 to {count - 1}")
    for name in found:
        say(name)


def info(path: Annotated[Positional[str], arg(metavar="demo|PATH")], *, json: Json = False) -> None:
    """Show what a model folder, an official file or a picture that `dar` wrote holds.

    Args:
        path: "demo", a pipeline or component folder, a .pt or .safetensors file, or a .png file.
        json: Print one JSON document.
    """
    found = describe_any(path)
    if json:
        say_json(found)
    if found.get("refused"):
        from dar_fast.checkpoint import CheckpointError

        raise CheckpointError(found["refused"])
    if not json:
        table(("what", "value"), list(flatten(found)))


def describe_any(path: str) -> dict[str, Any]:
    """The description of a model, or the metadata of a picture."""
    place = Path(path)
    if path == "demo":
        import dar_fast

        place = Path(dar_fast.__file__).parent / "assets" / "demo"
    elif place.is_file():
        with place.open("rb") as file:
            start = file.read(len(PNG))
        if start == PNG:
            from dar_fast.cli.save import read_metadata

            about = read_metadata(place)
            reason = None if about else f"{place}: expected a picture that dar wrote, got another"
            return {"path": path, "format": "picture", "refused": reason, **(about or {})}
    with working(f"reading {path}"):
        from dar_fast.checkpoint import describe

        return describe(place)


def flatten(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Rows of a table from nested values: `config.dim` and its value; what is None is left out."""
    for key, each in value.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(each, dict):
            yield from flatten(each, name)
        elif isinstance(each, list):
            more = f", … ({len(each)} in all)" if len(each) > LISTED else ""
            yield name, ", ".join(str(element) for element in each[:LISTED]) + more
        elif each is not None:
            yield name, f"{each:,}" if type(each) is int and each > 9_999 else str(each)


def convert(
    paths: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="SRC DST", help_behavior_hint="(required)")
    ] = (),
    *,
    to: Annotated[
        Form | None,
        arg(
            metavar="ours|official", help_behavior_hint="(default: official for .pt, .safetensors)"
        ),
    ] = None,
    image_size: Annotated[int | None, arg(metavar="R", help_behavior_hint="(default: 256)")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        arg(metavar="DTYPE", help_behavior_hint="(default: as stored)"),
    ] = None,
    quantize: Annotated[
        Literal["int8", "fp8"] | None,
        arg(metavar="int8|fp8", help_behavior_hint="(default: as stored)"),
    ] = None,
    json: Json = False,
) -> None:
    """Convert an official checkpoint to our folder, or back; nothing in the file is executed.

    Args:
        paths: One model, or a prior and a tokenizer, then where to. To ours: a component folder for
            one, a pipeline folder for two. To official: a .pt or .safetensors file, or a folder.
        to: The form to write.
        image_size: Of an official tokenizer, whose file does not say it.
        dtype: Of the weights written: float32, bfloat16 or float16.
        quantize: Write the prior's matrices in one byte an element, to our folder only; an official
            file made of such a folder holds the numbers that the bytes stand for.
        json: Print one JSON document.
    """
    if len(paths) < 2:
        raise ValueError(f"expected SRC and DST, got {len(paths)} path{'s' * (len(paths) != 1)}")
    *sources, target = paths
    official = target.suffix in (".pt", ".safetensors")
    form: Form = to or ("official" if official else "ours")
    if form == "ours" and official:
        raise ValueError(f"DST: expected the name of a folder, got '{target}'")
    with working("converting"):
        from dar_fast import checkpoint

        written = checkpoint.convert(
            sources, target, form,
            image_size=image_size, dtype=torch_dtype(dtype), quantize=quantize,
        )  # fmt: skip
    if json:
        files = [str(path) for path in written]
        sizes = [path.stat().st_size for path in written]
        inputs = [str(path) for path in sources]
        say_json({"to": form, "inputs": inputs, "files": files, "bytes": sum(sizes)})
        return
    for path in written:
        say(f"{path}: {path.stat().st_size:,} bytes")


def doctor(*, self_test: bool = False, json: Json = False) -> None:
    """Show versions, devices, and which implementation every op will use and why not another.

    Args:
        self_test: Hold every back end of attention that can run here to its definition in fp64.
        json: Print one JSON document.
    """
    import sys

    with working("looking around"):
        from rich.console import Console

        from dar_fast.doctor import doctor as examine
        from dar_fast.doctor import render

        report = examine(test_attention=self_test)
    if json:
        say_json(report)
    else:
        render(report, Console(file=sys.stdout))
    tests = report["attention"]["self_test"] or []
    if failed := [f"{t['implementation']} on {t['device']}" for t in tests if not t["passed"]]:
        raise RuntimeError(f"attention: expected every self-test to pass, got {', '.join(failed)}")
