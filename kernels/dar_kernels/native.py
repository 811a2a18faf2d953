"""The C++ ops: whether they were built, and if not why and how to get them."""

import functools
from importlib import import_module
from pathlib import Path

REASON = Path(__file__).with_name("_native_missing.txt")  # written by CMakeLists.txt
REMEDY = (
    "when that is mended, install again: "
    "pip install --force-reinstall --no-deps --no-cache-dir with dar-fast or the path of its source"
)


@functools.cache
def missing() -> str | None:
    """Why `dar_kernels._native` cannot be imported and how to get it; None where it can be."""
    try:
        import_module("dar_kernels._native")
    except ImportError as error:
        why = str(error)
        if isinstance(error, ModuleNotFoundError):
            why = (
                REASON.read_text().strip()
                if REASON.exists()
                else "the package runs from its source tree"
            )
        return f"not built, because {why}; {REMEDY}"
    return None


def isa_supported() -> tuple[str, ...]:
    """Instruction sets the C++ ops can use here, the one they use first; empty where not built."""
    if missing() is not None:
        return ()
    from dar_kernels import _native

    return tuple(_native.isa_supported())


def threading() -> str | None:
    """`OpenMP` or `std::thread`; None where not built."""
    if missing() is not None:
        return None
    from dar_kernels import _native

    return _native.threading
