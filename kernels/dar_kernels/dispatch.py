"""Which implementation of an op runs: by device and dtype, or the one the caller named, no other.

An op lists its implementations in order of preference; each says in a sentence why it cannot run
here, or this call, or None. The cost is a few attribute reads a call; what is installed is looked
up once. `prefer` is a wish to every op that has such an implementation; `require` orders one op.
"""

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch

from dar_kernels import native, triton_support

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


class UnavailableError(RuntimeError):
    """The implementation that the caller named cannot run here; the message says what to do."""


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _installed() -> None:
    return None


NAMES: dict[str, Callable[[], str | None]] = {
    "torch": _installed,
    "native": native.missing,
    "triton": triton_support.missing,
}
_PREFERRED: ContextVar[str | None] = ContextVar("dar_kernels implementation", default=None)
_REQUIRED: ContextVar[Mapping[str, str]] = ContextVar(
    "dar_kernels required", default=MappingProxyType({})
)


@contextmanager
def prefer(implementation: str) -> Iterator[None]:
    """Within it, every op whose `implementation` can run uses it; the others choose as ever.

    `implementation=` of a call comes first. A compiled graph keeps what held while it was traced.

    Args:
        implementation: `torch`, `native` or `triton`.

    Raises:
        ValueError: where no op could have an implementation of that name.
        UnavailableError: where it is not installed.
    """
    if implementation not in NAMES:
        raise ValueError(
            f"implementation: expected one of {', '.join(NAMES)}, got {implementation!r}"
        )
    reason = NAMES[implementation]()
    if reason is not None:
        raise UnavailableError(f"{implementation}: {reason}")
    token = _PREFERRED.set(implementation)
    try:
        yield
    finally:
        _PREFERRED.reset(token)


def preferred() -> str | None:
    """The implementation that `prefer` names here, if any."""
    return _PREFERRED.get()


@functools.cache
def capability() -> tuple[int, int] | None:
    """Compute capability of the CUDA device; None where there is none."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Implementation(Generic[P, R_co]):
    """One way to compute an op.

    Args:
        name: `torch`, `native` or `triton`, or a library's.
        also: further names that stand for it.
        run: the function; every implementation of an op takes the same arguments.
        devices: device types it runs on; empty: all.
        on_request: further device types, where the caller names it.
        dtypes: dtypes it takes; empty: all that the op takes.
        backward: whether gradients pass through it.
        by_default: whether it runs where nobody names it.
        capability: the least compute capability on CUDA.
        limits: why it cannot run a call of this description, which is the op's own; or None.
        missing: why it is not installed, and how to get it; None where it is.
    """

    name: str
    run: Callable[P, R_co]
    also: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    on_request: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    backward: bool = True
    by_default: bool = True
    capability: tuple[int, int] | None = None
    limits: Callable[[Any], str | None] | None = None
    missing: Callable[[], str | None] = _installed

    def answers(self, name: str) -> bool:
        """Whether `name` names it."""
        return name == self.name or name in self.also

    def why_not(
        self,
        device: str,
        dtype: torch.dtype,
        named: bool = False,
        grad: bool = False,
        call: Hashable = None,
    ) -> str | None:
        """The reason it cannot run on this device type and dtype, or this call, or None."""
        if grad and not self.backward:
            return "has no backward"
        if self.devices and device not in self.devices:
            if device not in self.on_request:
                return f"runs on {', '.join(self.devices)} only"
            if not named:
                return self.missing() or f"runs on {device} only where it is named"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {', '.join(str(d) for d in self.dtypes)} only"
        if self.limits is not None and call is not None:
            reason = self.limits(call)
            if reason is not None:
                return reason
        return self.missing() or self._here(device) or self._unnamed(named)

    def _here(self, device: str) -> str | None:
        found = capability() if device == "cuda" else None
        if self.capability is None or found is None or found >= self.capability:
            return None
        least, here = (".".join(map(str, c)) for c in (self.capability, found))
        return f"needs compute capability {least}, this device has {here}"

    def _unnamed(self, named: bool) -> str | None:
        return None if named or self.by_default else "runs only where it is named"


class Choice(NamedTuple):
    """What runs an op on one device, and what stands against each other implementation."""

    implementation: str
    others: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Op(Generic[P, R_co]):
    """An op's implementations, the preferred one first; the last one runs everywhere."""

    name: str
    implementations: tuple[Implementation[P, R_co], ...]

    def choose(
        self,
        device: str,
        dtype: torch.dtype,
        implementation: str | None = None,
        grad: bool = False,
        call: Hashable = None,
    ) -> Implementation[P, R_co]:
        """The one that `implementation` or `require` names, `prefer`'s where it can run, the first.

        `grad`: gradients are to pass through it. `call`: what the op's `limits` read.

        Raises:
            ValueError: where no implementation has that name.
            UnavailableError: where the named one cannot run on this device and dtype, or none can.
        """
        implementation = implementation or self.required
        if implementation is None and (wanted := preferred()) is not None:
            for candidate in self.implementations:
                named = candidate.answers(wanted)
                if named and candidate.why_not(device, dtype, named, grad, call) is None:
                    return candidate
        reasons: dict[str, str] = {}
        for candidate in self.implementations:
            if implementation is not None and not candidate.answers(implementation):
                continue
            reason = candidate.why_not(device, dtype, implementation is not None, grad, call)
            if reason is None:
                return candidate
            reasons[candidate.name] = reason
        if implementation is not None and not reasons:
            raise self._unknown(implementation)
        what = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UnavailableError(f"{self.name} on {device} in {dtype}: {what}")

    def pick(
        self,
        device: str,
        dtype: torch.dtype,
        implementation: str | None = None,
        grad: bool = False,
        call: Hashable = None,
    ) -> str:
        """The name of what `choose` chooses; a constant of the graph where torch.compile traces."""
        return self.choose(device, dtype, implementation, grad, call).name

    # What torch.compiler.assume_constant_result sets, without importing the compiler for it.
    pick._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @property
    def required(self) -> str | None:
        """The name that `require` gives for this op here, if any."""
        return _REQUIRED.get().get(self.name)

    def named(self, implementation: str) -> Implementation[P, R_co]:
        """The implementation of that name.

        Raises:
            ValueError: where there is none.
        """
        for candidate in self.implementations:
            if candidate.answers(implementation):
                return candidate
        raise self._unknown(implementation)

    def _unknown(self, implementation: str) -> ValueError:
        names = ", ".join(i.name for i in self.implementations)
        return ValueError(
            f"{self.name}: expected implementation one of {names}, got {implementation!r}"
        )

    def explain(self, device: str, dtype: torch.dtype) -> Choice:
        """The choice without a named implementation, and why not each other one."""
        chosen = self.choose(device, dtype).name
        return Choice(
            chosen,
            {
                i.name: i.why_not(device, dtype) or f"{chosen} is preferred"
                for i in self.implementations
                if i.name != chosen
            },
        )


@contextmanager
def require(op: Op[..., object], implementation: str) -> Iterator[None]:
    """Within it, every call of `op` runs this implementation, or raises why it cannot.

    `implementation=` of a call comes first. A compiled graph keeps what held while it was traced.

    Raises:
        ValueError: where the op has no implementation of that name.
        UnavailableError: where it is not installed, or needs another GPU.
    """
    found = op.named(implementation)
    reason = found.missing() or found._here("cuda")
    if reason is not None:
        raise UnavailableError(f"{op.name}: {found.name}: {reason}")
    token = _REQUIRED.set({**_REQUIRED.get(), op.name: found.name})
    try:
        yield
    finally:
        _REQUIRED.reset(token)


def report(
    ops: Sequence[Op[..., object]],
    devices: Sequence[str] = ("cpu", "cuda"),
    dtype: torch.dtype = torch.float32,
) -> dict[str, dict[str, Choice]]:
    """For each op and device type, what will run and why the others will not."""
    return {op.name: {device: op.explain(device, dtype) for device in devices} for op in ops}
