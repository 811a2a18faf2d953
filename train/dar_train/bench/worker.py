"""A subject in a process of its own, so that its memory is its own: steps on request, by a pipe.

Peak memory on a CPU is the largest resident size of the process since the subject was built, less
that before: what a machine must have. On CUDA it is the allocator's peak.
"""

import multiprocessing
import time
from collections.abc import Iterable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from dar_fast.bench.measure import synchronize
from dar_train.bench.subjects import Setting, Subject, plain, trained

Kind = Literal["ours", "plain"]
PARTS = ("data", "forward", "backward", "clip", "optimizer", "average")  # labels of the loop
SUBJECTS = {"ours": trained, "plain": plain}


class WorkerError(RuntimeError):
    """A subject failed in its process."""


class Memory(NamedTuple):
    """Bytes of a subject."""

    peak: int
    weights: int
    gradients: int
    optimizer: int
    average: int


def resident(field: Literal["VmRSS", "VmHWM"]) -> int:
    """Bytes of this process in memory, now or at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"{field}: expected a line of that name in /proc/self/status, got none")


def forget_peak() -> None:
    """Let the largest resident size begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def memory_of(subject: Subject, peak: int) -> Memory:
    """Its parts after a step; activations are what the peak has beyond them."""
    states = [
        value
        for optimizer in subject.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    parameters = list(subject.model.parameters())
    average = subject.average or nn.Module()
    return Memory(
        peak, _bytes(parameters), _bytes(p.grad for p in parameters), _bytes(states),
        _bytes(average.parameters()),
    )  # fmt: skip


def _parts(subject: Subject, trace: Path | None) -> dict[str, float]:
    """Seconds of one step by part, from a profile; only the loop's steps have parts."""
    cuda = torch.cuda.is_available()
    with torch.profiler.profile() as record:
        subject.step()
        synchronize()
    if trace is not None:
        record.export_chrome_trace(str(trace))
    seconds = {}
    for event in record.key_averages():
        if event.key in PARTS:
            took = event.device_time_total if cuda else event.cpu_time_total
            seconds[event.key] = took / 1e6
    return seconds


def _serve(pipe: Connection, kind: Kind, setting: Setting) -> None:
    try:
        if setting.threads is not None:
            torch.set_num_threads(setting.threads)
        cuda = setting.device.startswith("cuda")
        torch.zeros(1, device=setting.device)
        before = 0 if cuda else resident("VmRSS")
        with SUBJECTS[kind](setting) as subject:
            pipe.send("ready")
            while (request := pipe.recv()) is not None:
                pipe.send(_answer(subject, request, before, cuda))
    except Exception as error:  # whatever it was, the other side is waiting for a word
        pipe.send(WorkerError(f"{kind}: {type(error).__name__}: {error}"))


def _answer(subject: Subject, request: str, before: int, cuda: bool) -> object:
    if request == "memory":
        if cuda:
            return memory_of(subject, torch.cuda.max_memory_allocated())
        return memory_of(subject, resident("VmHWM") - before)
    if request == "warm":
        subject.step()
        synchronize()
        torch.cuda.reset_peak_memory_stats() if cuda else forget_peak()
        return None
    if request == "step":
        synchronize()
        start = time.perf_counter()
        subject.step()
        synchronize()
        return time.perf_counter() - start
    _, _, trace = request.partition(" ")
    return _parts(subject, Path(trace) if trace else None)


class Worker:
    """One subject's process."""

    def __init__(self, kind: Kind, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, setting), daemon=True)
        self.kind = kind

    def __enter__(self) -> Self:
        self._process.start()
        self._receive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.is_alive():
            if error is None:
                self._pipe.send(None)
                self._process.join(60)
            self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            while not self._pipe.poll(1.0):
                if not self._process.is_alive() and not self._pipe.poll():
                    raise EOFError("no answer")
            answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise WorkerError(
                f"{self.kind}: its process ended with status {self._process.exitcode}, "
                "as it does where memory runs out"
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, request: str) -> Any:
        """The answer to `step` (seconds), `warm`, `memory` or `parts [FILE]`.

        Raises:
            WorkerError: where the subject failed or its process died.
        """
        with suppress(BrokenPipeError):  # it is gone: what is left to read says so
            self._pipe.send(request)
        return self._receive()
