"""What a name in a pickle may become: the few constructors we know, an inert name, or a refusal.

Known are tensors, containers and plain values. A class of anybody else's stays a `Name`, and what
it builds a `Record`. Names of the standard library, torch and numpy that are not known here are
refused, since they are where code can run, and so is calling what is not written like a class.
"""

import struct
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch

from dar_fast.checkpoint.errors import CheckpointError, Limits
from dar_fast.checkpoint.records import Name, Record
from dar_fast.checkpoint.storages import DTYPES, STORAGES, Storages, is_tensor_class

_INERT = {  # standard classes that hold data: their objects become records
    "argparse.Namespace", "types.SimpleNamespace", "enum.Enum", "typing.Any", "typing.Dict",
    "typing.List", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePath",
    "pathlib.PurePosixPath", "pathlib.PureWindowsPath", "datetime.datetime", "datetime.date",
    "datetime.timedelta", "collections.Counter", "collections.UserDict", "numpy.dtype",
    "numpy.ndarray", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
    "torch.storage.UntypedStorage", *(f"torch.{name}" for name in STORAGES),
}  # fmt: skip
# Beyond the standard library: packages that run code on request, and modules that this Python's
# list lacks (removed ones, other platforms', Python 2's).
_REFUSED_ROOTS = sys.stdlib_module_names | {
    "torch", "torchvision", "torchaudio", "numpy", "scipy", "pandas", "pip", "setuptools",
    "pkg_resources", "cloudpickle", "dill", "joblib", "yaml", "IPython", "_pytest", "pytest",
    "numba", "triton", "safetensors", "dar_fast", "dar_kernels", "dar_train", "cffi", "jinja2",
    "sympy", "paramiko", "fabric", "invoke", "copy_reg", "cPickle", "commands", "popen2",
    "__builtin__", "exceptions", "UserDict", "imp", "distutils", "asyncore", "smtpd", "crypt",
    "nis", "spwd", "org", "java", "nt", "posix", "winreg", "_winapi", "msvcrt",
}  # fmt: skip
_NUMPY_FORMATS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b",
                  "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}  # fmt: skip
_PYTHON2 = {"__builtin__": "builtins"}

Constructor = Callable[[tuple[Any, ...]], Any]


class Constructors:
    """Resolves names and applies them; every value built here is a tensor, a container or plain."""

    def __init__(self, storages: Storages, limits: Limits) -> None:
        self.storages = storages
        self.limits = limits
        self._left = limits.copied
        self._known: dict[str, Constructor] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch._utils._rebuild_parameter_with_state": self._parameter,
            "torch._tensor._rebuild_from_type_v2": self._from_type,
            "torch.Size": lambda args: torch.Size(_integers(self._one(args, tuple | list))),
            "torch.device": _device,
            "collections.OrderedDict": lambda args: OrderedDict(self._pairs(args)),
            "collections.defaultdict": lambda args: defaultdict(None, self._pairs(args[1:])),
            "builtins.dict": lambda args: dict(self._pairs(args)),
            "builtins.list": lambda args: list(self._one(args, list | tuple)),
            "builtins.tuple": lambda args: tuple(self._one(args, list | tuple)),
            "builtins.set": lambda args: set(map(checked_key, self._one(args, list | tuple))),
            "builtins.frozenset": lambda args: frozenset(
                map(checked_key, self._one(args, list | tuple))
            ),
            "builtins.bytes": lambda args: bytes(self._one(args, bytes | tuple)),
            "builtins.bytearray": lambda args: bytearray(self._one(args, bytes | tuple)),
            "builtins.complex": _complex,
            "builtins.int": _number,
            "builtins.float": _number,
            "builtins.bool": _number,
            "builtins.str": lambda args: str(self._one(args, str)),
            "_codecs.encode": self._latin1,
            "numpy._core.multiarray.scalar": self._scalar,
            "numpy.core.multiarray.scalar": self._scalar,
            "numpy._core.multiarray._reconstruct": self._array,
            "numpy.core.multiarray._reconstruct": self._array,
        }  # fmt: skip

    def resolve(self, module: object, name: object) -> Any:
        """The dtype, or the inert name, that `module.name` stands for.

        Raises:
            CheckpointError: where the name is not known and may run code.
        """
        if not isinstance(module, str) or not isinstance(name, str):
            raise CheckpointError("refused a name that is not a string")
        module = _PYTHON2.get(module, module)
        full = f"{module}.{name}"
        if len(full) > self.limits.name_bytes:
            raise CheckpointError(f"refused a name of {len(full)} characters: {full[:64]}...")
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in self._known or full in _INERT:
            return Name(module, name)
        parts = full.split(".")
        if not all(part.isidentifier() for part in parts):
            raise CheckpointError(f"refused {full!r}: not a class name")
        if parts[0] in _REFUSED_ROOTS or any(_is_dunder(p) for p in parts[1:]) or (
            _is_dunder(parts[0]) and parts[0] != "__main__"
        ):  # fmt: skip
            raise CheckpointError(
                f"refused {full}: it may run code, and no tensor or plain value needs it"
            )
        return Name(module, name)

    def call(self, target: object, args: object) -> Any:
        """What REDUCE means: a known constructor's value, or a record of a class."""
        if not isinstance(target, Name):
            raise CheckpointError(f"refused to call a {type(target).__name__}")
        if not isinstance(args, tuple):
            raise CheckpointError(f"refused {target}: arguments are a {type(args).__name__}")
        known = self._known.get(str(target))
        if known is not None:
            try:
                return known(args)
            except (ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
                raise CheckpointError(
                    f"refused {target}: bad arguments ({str(error)[:200]})"
                ) from None
        if (
            not target.name.rsplit(".", 1)[-1].lstrip("_")[:1].isupper()
            and str(target) not in _INERT
        ):
            raise CheckpointError(f"refused to call {target}: not a class")
        return Record(target.module, target.name, args)

    def new(self, target: object, args: object, kwargs: object = None) -> Any:
        """What NEWOBJ means: an object of a class, without its constructor."""
        if not isinstance(target, Name) or not isinstance(args, tuple):
            raise CheckpointError(f"refused to instantiate a {type(target).__name__}")
        kwargs = {} if kwargs is None else kwargs
        if type(kwargs) is not dict:
            raise CheckpointError(f"refused {target}: keyword arguments are not a dict")
        if str(target) in self._known:
            if kwargs:
                raise CheckpointError(f"refused {target} with keyword arguments")
            return self.call(target, args)
        return Record(target.module, target.name, args, kwargs)

    def charge(self, amount: int) -> None:
        """Count what is copied: a short pickle can ask for many copies of one long list."""
        self._left -= amount
        if self._left < 0:
            raise CheckpointError(f"copies more than {self.limits.copied} values")

    def _one(self, args: tuple[Any, ...], kind: Any) -> Any:
        if len(args) > 1 or (args and not isinstance(args[0], kind)):
            raise TypeError(f"expected one {kind}, got {[type(a).__name__ for a in args][:4]}")
        value = args[0] if args else ()
        self.charge(len(value))
        return value if args or kind is not str else ""

    def _pairs(self, args: tuple[Any, ...]) -> list[tuple[Any, Any]]:
        given = self._one(args, dict | list | tuple)
        pairs = list(given.items()) if isinstance(given, dict) else [(k, v) for k, v in given]
        return [(checked_key(k), v) for k, v in pairs]

    def _tensor(self, args: tuple[Any, ...]) -> torch.Tensor:
        _at_least(args, 4)
        if len(args) > 6 and args[6]:
            raise CheckpointError(
                "tensors with metadata (conjugated or negated views) are not read"
            )
        return self.storages.view(args[0], args[1], args[2], args[3], None)

    def _typed_tensor(self, args: tuple[Any, ...]) -> torch.Tensor:
        _at_least(args, 7)
        if any(args[7:]) or not isinstance(args[6], torch.dtype):
            raise CheckpointError("tensor without dtype, or with metadata, is not read")
        return self.storages.view(args[0], args[1], args[2], args[3], args[6])

    def _parameter(self, args: tuple[Any, ...]) -> torch.Tensor:
        if not args or not isinstance(args[0], torch.Tensor):
            raise TypeError("expected a tensor")
        return args[0]

    def _from_type(self, args: tuple[Any, ...]) -> Any:
        _at_least(args, 3)
        if not is_tensor_class(args[1]) or not str(args[0]).startswith("torch._utils._rebuild_"):
            raise CheckpointError(f"refused tensor subclass {args[1]}")
        tensor = self.call(args[0], args[2])
        if not isinstance(tensor, torch.Tensor):
            raise TypeError("expected a tensor")
        return tensor

    def _latin1(self, args: tuple[Any, ...]) -> bytes:
        text, encoding = args
        if not isinstance(text, str) or encoding != "latin1":
            raise TypeError("expected a string and latin1")
        self.charge(len(text))
        return text.encode("latin1")

    def _scalar(self, args: tuple[Any, ...]) -> Any:
        """A numpy scalar as Python's number, where it is one."""
        dtype, data = args
        if isinstance(dtype, Record) and str(Name(dtype.module, dtype.name)) == "numpy.dtype":
            code = _NUMPY_FORMATS.get(dtype.args[0]) if isinstance(dtype.args[0], str) else None
            order = (
                dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else None
            )
            if code is not None and order in ("<", "|") and isinstance(data, bytes):
                return struct.unpack("<" + code, data)[0]
        return Record("numpy", "scalar", args)

    def _array(self, args: tuple[Any, ...]) -> Record:
        return Record("numpy", "ndarray", args)


def checked_key(key: Any) -> Any:
    """A dictionary key that hashes in bounded time; nested tuples and huge integers may not."""
    if isinstance(key, str | bytes | float | None) or (type(key) is int and abs(key) < 1 << 60):
        return key
    if isinstance(key, bool | torch.dtype):
        return key
    raise CheckpointError(f"refused dictionary key of type {type(key).__name__}")


def _at_least(args: tuple[Any, ...], count: int) -> None:
    if len(args) < count:
        raise TypeError(f"expected {count} arguments, got {len(args)}")


def _integers(values: Any) -> list[int]:
    if len(values) > 64 or not all(type(v) is int and 0 <= v < 1 << 48 for v in values):
        raise ValueError("expected sizes")
    return list(values)


def _number(args: tuple[Any, ...]) -> Any:
    (value,) = args
    if not isinstance(value, int | float | bool):
        raise TypeError("expected a number")
    return value


def _complex(args: tuple[Any, ...]) -> complex:
    real, imaginary = args
    return complex(_number((real,)), _number((imaginary,)))


def _device(args: tuple[Any, ...]) -> torch.device:
    kind, index = (*args, None)[:2]
    if kind not in ("cpu", "cuda", "mps", "xpu", "meta", "hpu") or not (
        index is None or (type(index) is int and 0 <= index < 128)
    ):
        raise ValueError("expected a device")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _is_dunder(part: str) -> bool:
    return part.startswith("__")


__all__ = ["Constructors", "checked_key"]
