"""The engine: requests in, events and pictures out, while everything shares one machine.

    with Engine.from_pretrained("demo") as engine:
        handle = engine.submit(GenerationRequest(label=3, seed=0, previews=True))
        for event in handle: ...

A request's codes depend on its own label, seed and settings; who else is in flight, when it came
and what became of the others changes nothing about them.
"""

import os
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any, Self, cast

import torch

from dar_fast.engine.board import Board
from dar_fast.engine.config import EngineConfig
from dar_fast.engine.errors import EngineClosedError
from dar_fast.engine.events import Event, Result
from dar_fast.engine.graphs import GraphReport
from dar_fast.engine.handle import Handle, Listener
from dar_fast.engine.machine import Machine
from dar_fast.engine.request import GenerationRequest, Plan, check_request
from dar_fast.engine.scoring import SCORERS
from dar_fast.engine.stats import Stats
from dar_fast.engine.tasks import Job, Task
from dar_fast.models import Prior, Tokenizer
from dar_kernels.openmp import release_threads


class Engine:
    """Runs many requests at once over one prior and one tokenizer; any thread may call it.

    Args:
        prior: draws codes.
        tokenizer: turns them into pictures; on the same device.
        config: sizes and modes.

    Raises:
        ValueError: where the parts do not fit each other, or the memory of the device.
        UnavailableError: where the device cannot do what the configuration names.
    """

    def __init__(
        self, prior: Prior, tokenizer: Tokenizer, config: EngineConfig | None = None
    ) -> None:
        self.config = EngineConfig() if config is None else config
        self.prior, self.tokenizer = prior, tokenizer
        self._machine = Machine(prior, tokenizer, self.config)
        self._board: Board = self._machine.board
        self._numbers = count()
        # a handle keeps its job; weak on both sides, so that a dropped handle takes all along
        self._jobs: weakref.WeakKeyDictionary[Handle, weakref.ref[Job]]
        self._jobs = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        # threads hold the machine, not the engine: one that is forgotten is closed
        self._finalizer = weakref.finalize(self, self._machine.abandon)
        self._finalizer.atexit = False  # the machine sees to that

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The engine of a folder, or of "demo"; see `DARPipeline.from_pretrained`."""
        from dar_fast.pipeline import DARPipeline  # which draws through an engine

        pipeline = DARPipeline.from_pretrained(path, device, dtype)
        return cls(pipeline.prior, pipeline.tokenizer, config)

    def submit(self, request: GenerationRequest, listener: Listener | None = None) -> Handle:
        """Queue a request.

        Args:
            request: what to draw.
            listener: called with each event, in the engine's thread, so it must not wait for
                other requests; what it raises fails this one.

        Raises:
            TypeError, ValueError: where the request does not fit the model.
            AdmissionError: where this engine can never serve it.
            QueueFullError: where `max_queue` requests wait already.
            EngineClosedError: after `close`.
        """
        plans = self._check(request)
        return self._submit(request, plans, listener)

    def fork(
        self,
        handle: Handle,
        group: int,
        *,
        seed: int | None = None,
        listener: Listener | None = None,
        **changes: Any,
    ) -> Handle:
        """A request that shares another one's first `group` groups of codes and goes its own way.

        It waits until the other has them, and takes over its keys and values as long as that is
        drawing. It starts from the same noise unless `noise_seed` is among the changes. The
        same as a request with these codes for `prefix_codes`.

        Args:
            handle: of the request to share with; of `best_of`, the winner.
            group: groups to share, in [1, G) of the new request.
            seed: of the codes that follow; None: drawn.
            listener: see `submit`.
            changes: other fields of the request, such as `label` or `sampling`.

        Raises:
            ValueError: where the handle is not this engine's, or the group or a change not fit.
            AdmissionError, QueueFullError, EngineClosedError: see `submit`.
        """
        if not isinstance(handle, Handle):
            raise TypeError(f"handle: expected a Handle, got {type(handle).__name__}")
        if isinstance(group, bool) or not isinstance(group, int):
            raise TypeError(f"group: expected an integer, got {type(group).__name__} {group!r}")
        known = self._jobs.get(handle)
        parent = None if known is None else known()
        if parent is None:
            raise ValueError("handle: expected one of a request to this engine")
        if "prefix_codes" in changes:
            raise ValueError("prefix_codes: expected none, a fork has those of its parent")
        changes = {"best_of": None, "prefix_codes": (), **changes}
        request = replace(parent.request, seed=seed, **changes)
        plans = self._check(request, group)
        most = min(plans[0].groups - 1, parent.tasks[0].plan.groups)
        if not 1 <= group <= most:
            raise ValueError(f"group: expected an integer in [1, {most}], got {group}")
        if request.best_of is not None and request.best_of.groups <= group:
            raise ValueError(
                f"best_of.groups: expected more than the {group} that all candidates share, "
                f"got {request.best_of.groups}"
            )
        return self._submit(request, plans, listener, parent, group)

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        """The events of a request; to stop iterating cancels it. Arguments as `submit`."""
        handle = self.submit(request)

        def events() -> Iterator[Event | None]:
            try:
                yield None
                yield from handle
            finally:
                handle.cancel()

        iterator = events()
        next(iterator)  # it has begun: closed before its first event it cancels too
        return cast(Iterator[Event], iterator)

    def generate(self, requests: Iterable[GenerationRequest]) -> list[Result]:
        """Results in order of the requests; all of them are in the queue at once.

        Raises:
            EngineError: of the first that fails; the others are cancelled.
            TypeError, ValueError: see `submit`; nothing is left running.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                handles.append(self.submit(request))
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def stats(self) -> Stats:
        """What it has done and holds."""
        return self._machine.stats()

    def memory(self) -> dict[str, int]:
        """Bytes of weights, slots and pages."""
        return dict(self._machine.memory)

    def graphs(self) -> list[GraphReport]:
        """Graphs captured so far, with their memory; none on a CPU."""
        return self._machine.graphs()

    def close(self, drain: bool = False) -> None:
        """Take no more requests, cancel those in flight, or with `drain` finish them; then stop.

        Harmless a second time.
        """
        self._machine.close(drain)

    @property
    def closed(self) -> bool:
        return self._board.closing

    def __enter__(self) -> Self:
        if self.closed:
            raise EngineClosedError("engine: expected an open one, got one that is closed")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, request: GenerationRequest, fork_group: int = 0) -> list[Plan]:
        plans = check_request(request, self.prior.config, self.tokenizer.config, SCORERS)
        if not fork_group:
            return plans
        start = fork_group * self.tokenizer.config.group_size
        guided = request.sampling.guided(self.tokenizer.config.num_tokens, start)
        return [replace(plan, guided=guided) for plan in plans]

    def _submit(
        self,
        request: GenerationRequest,
        plans: list[Plan],
        listener: Listener | None,
        parent: Job | None = None,
        group: int = 0,
    ) -> Handle:
        if listener is not None and not callable(listener):
            raise TypeError(f"listener: expected a callable, got {type(listener).__name__}")
        with self._lock:
            number = next(self._numbers)
        board, late = self._board, request.deadline
        release_threads()  # those of the caller, who will wait
        handle = Handle(number, lambda: board.cancel(job), listener)
        job = Job(
            request=request, handle=handle, order=number,
            expires=float("inf") if late is None else time.monotonic() + late, fork_group=group,
        )  # fmt: skip
        hold = None if request.best_of is None else request.best_of.groups
        job.tasks = [Task(plan=p, job=job, index=i, hold=hold) for i, p in enumerate(plans)]
        self._jobs[handle] = weakref.ref(job)
        board.submit(job, parent)
        return handle


__all__ = ["Engine"]
