"""How `dar` starts, helps, forwards, reports and exits; no bar without a terminal."""

import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dar_fast.cli import main, report
from dar_fast.cli.errors import message

Dar = Callable[..., Any]
ROOT = Path(__file__).parents[3]
PATHS = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "train"))


def process(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`dar` in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dar_fast.cli", *argv],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_missing_training_packages_are_named(dar: Dar, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dar_train", None)
    monkeypatch.delitem(sys.modules, "dar_train.cli", raising=False)
    done = dar("train", "tokenizer")
    assert done.status == 1 and "pip install 'dar-fast[train]'" in done.err


def test_train_forwards_the_rest_of_the_line(dar: Dar, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    fake = type(sys)("dar_train.cli")
    fake.run = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dar_train.cli", fake)
    assert dar("train", "prior", "--minutes", 3, "--debug").status == 0
    assert seen == [["prior", "--minutes", "3"]]


@pytest.mark.parametrize("place", range(4))
def test_debug_anywhere_shows_the_traceback(dar: Dar, place: int) -> None:
    argv = ["sample", "-n", "0"]
    argv.insert(place, "--debug")
    done = dar(*argv)
    assert done.status == 2
    assert "Traceback" in done.err and done.err.endswith(
        "dar: error: n: expected an integer >= 1, got 0\n"
    )


def test_help_and_version(dar: Dar) -> None:
    overview = dar("--help")
    assert overview.status == 0
    for name in ("sample", "preview", "restyle", "reconstruct", "encode", "decode", "train"):
        assert f"\n  {name} " in overview.out
        if name != "train":
            own = dar(name, "--help")
            assert own.status == 0 and f"dar {name}" in own.out and "--model" in own.out
    assert re.fullmatch(r"dar \d+\.\d+\.\d+\S*\n", dar("--version").out)


def test_messages_are_one_short_line() -> None:
    assert message(ValueError("a\n  b")) == "a b"
    assert message(OSError(errno.ENOENT, "No such file", "x.png")) == "x.png: No such file"
    assert message(KeyError("x")) == "KeyError: 'x'"
    assert len(message(RuntimeError("x" * 5000))) <= 600


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_only_where_work_is_long_and_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(second) for second in range(100))
    monkeypatch.setattr("dar_fast.cli.report.time.perf_counter", lambda: next(clock))

    def shown(stream: io.StringIO, total: int) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        with report.progress("drawing", total) as advance:
            for _ in range(total):
                advance()
        return stream.getvalue()

    assert shown(io.StringIO(), 5) == ""
    assert "drawing" in shown(Terminal(), 5)
    assert shown(Terminal(), 1) == ""  # one second: nothing to wait for


def test_no_torch_before_a_command_needs_it(here: Path) -> None:
    code = (
        "import sys\n"
        "from dar_fast.cli import main\n"
        "for line in ('--help', '--version', 'sample --help', 'sample --stps 1'):\n"
        "    main(line.split())\n"
        "print([m for m in ('torch', 'numpy', 'PIL', 'rich') if m in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_model_loads_without_torchs_compiler(model: str, here: Path) -> None:
    code = (
        "import sys\n"
        "from dar_fast import DARPipeline\n"
        f"DARPipeline.from_pretrained({model!r}, device='cpu')\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": PATHS}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_process_exits_with_the_status(model: str, here: Path) -> None:
    good = process("sample", "hotel", "--model", model, cwd=here)
    assert (good.returncode, good.stderr) == (0, "")  # no bar: stderr is no terminal
    usage = process("sample", "-n", "0", cwd=here)
    assert usage.returncode == 2 and "Traceback" not in usage.stderr
    rest = process("sample", "--model", "nope", cwd=here)
    assert rest.returncode == 1 and rest.stderr.count("\n") == 1


def test_main_reads_the_process_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dar", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("dar ")
