"""Archives made by hand, and a watch over everything that running code would need."""

import contextlib
import sys
import zipfile

import pytest
from checkpoint_models import PRIOR, official_state

from dar_fast.checkpoint import load_official_prior, save_model
from dar_fast.checkpoint.unpickler import read_torch_file
from dar_fast.quantization import quantize_prior

FORBIDDEN = (
    "os.", "subprocess.", "exec", "compile", "import", "socket.", "ctypes.", "shutil.", "pickle.",
    "marshal.", "pty.", "webbrowser.", "code.", "cpython.", "sys.set", "tempfile.", "glob.",
)  # fmt: skip
_seen: list[str] | None = None


def _hook(event, args):
    if _seen is not None and (
        event.startswith(FORBIDDEN) or (event == "open" and str(args[1]) not in ("r", "rb"))
    ):
        _seen.append(f"{event} {args!r:.200}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watch():
    global _seen
    _seen = []
    try:
        yield
        events = list(_seen)
    finally:
        _seen = None
    assert events == []


@pytest.fixture
def pack(tmp_path):
    """Write an archive of members (data.pkl's bytes, or a dict) as torch.save lays it out."""

    def write(members, *, root="archive/", method=zipfile.ZIP_STORED, storage=bytes(16)):
        if isinstance(members, bytes):
            members = {"data.pkl": members, "byteorder": b"little", "data/0": storage}
        path = tmp_path / "file.pt"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(root + name, data)
        return path

    return write


@pytest.fixture
def read():
    """`read_torch_file` under watch: no audit event of running code may occur."""

    def run(path, **options):
        with _watch():
            return read_torch_file(path, **options)

    return run


@pytest.fixture(scope="module")
def state():
    return official_state(PRIOR)


@pytest.fixture
def prior(state):
    return load_official_prior(state, PRIOR)


@pytest.fixture
def saved(tmp_path, prior):
    """A folder in int8."""
    quantize_prior(prior, "int8")
    save_model(prior, tmp_path / "saved")
    return tmp_path / "saved"
