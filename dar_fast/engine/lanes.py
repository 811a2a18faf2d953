"""The two lanes: one draws groups of codes, the other turns them into pictures, at the same time.

Each is a thread with a stream of its own. The token lane is bound by memory (every weight of the
prior once a code, for all requests), the diffusion lane by arithmetic (332 GFLOP a step of
tokenizer v1), so a step of one request hides behind the next group of the others, and of its own.
"""

import contextlib
import contextvars
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dar_fast.engine.board import Board
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.cores import Cores
from dar_fast.engine.diffusion import Diffusion
from dar_fast.engine.isolation import run_isolated
from dar_fast.engine.rows import TokenRunner
from dar_fast.engine.streams import Mark, Shipment, Streams
from dar_fast.engine.tasks import Task
from dar_kernels.openmp import release_threads

log = logging.getLogger(__name__)
AHEAD = 2  # batches that a lane's thread is ahead of the device: the device never waits for it


class Lane(ABC):
    """A thread that takes batches from the board, runs them and brings what they give.

    Args:
        board: where tasks come from.
        streams: of the engine's device.
        turn: held while a batch runs: one lock for both lanes where they are not to overlap.
        cores: of the processor, on a CPU.
    """

    name = ""

    def __init__(
        self,
        board: Board,
        streams: Streams,
        turn: AbstractContextManager[object],
        cores: Cores | None,
    ) -> None:
        self.board, self.streams, self.turn, self.cores = board, streams, turn, cores
        self.seconds = 0.0  # at work
        self._ahead: deque[Mark] = deque()
        context = contextvars.copy_context()  # implementations that the caller prefers
        self.thread = threading.Thread(
            target=context.run, args=(self._main,), name=f"dar {self.name}", daemon=True
        )

    @property
    @abstractmethod
    def stream(self) -> "torch.cuda.Stream | None":
        """Where its work goes on a GPU."""

    @abstractmethod
    def pick(self) -> list[Task]:
        """Tasks to work on; called under the board's lock."""

    @abstractmethod
    def work(self, tasks: list[Task]) -> None:
        """Run a batch and bring what it gives."""

    def rest(self) -> None:
        """Before a wait: idle teams slow others down, and torch gives new threads the number of
        threads that was last set."""
        if self.cores is not None:
            torch.set_num_threads(self.cores.default)
        release_threads()

    def _main(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            log.exception("dar_fast.engine: the %s lane stopped", self.name)
            self.board.crash(error)
        finally:
            self.board.lane_left()

    @torch.no_grad()
    def _loop(self) -> None:
        with self.streams.on(self.stream):
            while tasks := self.board.take(self.pick, self.rest):
                with self.turn:
                    start = time.perf_counter()
                    try:
                        self.work(tasks)
                    except Exception as error:  # not the batch's fault: what is left of it fails
                        log.exception("dar_fast.engine: %s lane", self.name)
                        self.board.failed((task, error) for task in tasks)
                    self._pace()
                    self.seconds += time.perf_counter() - start

    def _pace(self) -> None:
        """Wait until the device is at most `AHEAD` batches behind; none where lanes take turns."""
        self._ahead.append(self.streams.mark(self.stream))
        ahead = AHEAD if isinstance(self.turn, contextlib.nullcontext) else 0
        while len(self._ahead) > ahead:
            self._ahead.popleft().wait()

    def isolate(self, run: Callable[[Sequence[Task]], Tensor], tasks: list[Task]) -> Tensor | None:
        """What `run` gives for the tasks that do not fail, which stay in `tasks`; the others go."""
        ran = run_isolated(run, tasks)
        if ran.failed:
            self.board.failed(ran.failed)
        self.board.retried(ran.retries)
        tasks[:] = [task for part, _ in ran.done for task in part]
        return torch.cat([result for _, result in ran.done]) if ran.done else None


class TokenLane(Lane):
    """Draws the next group of codes of every task that can go on, in one batch."""

    name = "tokens"

    def __init__(
        self,
        board: Board,
        streams: Streams,
        turn: AbstractContextManager[object],
        runner: TokenRunner,
        codes: Tensor,
        cores: Cores | None,
    ) -> None:
        super().__init__(board, streams, turn, cores)
        self.runner, self.codes = runner, codes

    @property
    def stream(self) -> "torch.cuda.Stream | None":
        return self.streams.tokens

    def pick(self) -> list[Task]:
        # With a few cores, and all of them on a first step, its preview comes sooner and nothing
        # is lost: they all have work, and there is enough left to overlap.
        tasks = self.board.to_draw(after_first_steps=bool(self.cores and not self.cores.fixed))
        self.alone = not self.board.diffusion_waits
        return tasks

    def work(self, tasks: list[Task]) -> None:
        with self.cores.tokens(self.alone) if self.cores else contextlib.nullcontext() as cores:
            codes = self.isolate(self._draw, tasks)
            if cores is not None and cores > 1:
                release_threads()  # before the other lane takes these cores
        if codes is not None:
            mark = self.streams.mark(self.stream)
            for task in tasks:
                task.drawn_mark = mark
            self.board.drew(tasks, self.streams.ship([codes], self.stream))

    def _draw(self, tasks: Sequence[Task]) -> Tensor:
        Q = self.board.scheduler.group_size
        for task in tasks:
            task.free.hold(self.stream)
            if task.inherited:
                known = torch.tensor(task.plan.prefix[: task.drawn * Q])
                self.codes[task.slot, : len(known)] = known.to(self.codes.device)
        pairs = [pair for task in tasks for pair in task.copies]
        if pairs:
            self.runner.copy_pages(pairs)
            for task in tasks:
                task.copies.clear()  # once: a batch that is run again may have written to them
        return self.runner.run([task.token_row(Q) for task in tasks])


class DiffusionLane(Lane):
    """Extends conditions, takes solver steps, hands out pictures."""

    name = "diffusion"

    def __init__(
        self,
        board: Board,
        streams: Streams,
        turn: AbstractContextManager[object],
        conditions: Conditions,
        diffusion: Diffusion,
        batch: int,
        cores: Cores | None,
    ) -> None:
        super().__init__(board, streams, turn, cores)
        self.conditions, self.diffusion, self.batch = conditions, diffusion, batch

    @property
    def stream(self) -> "torch.cuda.Stream | None":
        return self.streams.diffusion

    def pick(self) -> list[Task]:
        return self.board.scheduler.to_finish() or self.board.scheduler.to_step(self.batch)

    def work(self, tasks: list[Task]) -> None:
        with self.cores.diffusion() if self.cores else contextlib.nullcontext():
            if tasks[0].complete:
                self._finish(tasks)
            else:
                self._step(tasks)

    def _finish(self, tasks: list[Task]) -> None:
        for task in tasks:
            image = task.estimate if task.plan.early else self.diffusion.image(task.slot)
            if image is None:
                raise RuntimeError("diffusion: expected the estimate of the last step, got none")
            shipment = self.streams.ship([image], self.stream)
            task.stepped_mark = self.streams.mark(self.stream)
            self.board.finish(task, shipment)

    def _step(self, tasks: list[Task]) -> None:
        previews = self.isolate(self._evaluate, tasks)
        if previews is None:
            return
        shipment: Shipment | None = None
        if any(task.job.undecided or task.job.request.previews for task in tasks):
            shipment = self.streams.ship([previews], self.stream)
        mark = self.streams.mark(self.stream)
        for task in tasks:
            task.stepped_mark = mark
        self.board.stepped(tasks, previews, shipment)

    def _evaluate(self, tasks: Sequence[Task]) -> Tensor:
        for task in tasks:
            task.drawn_mark.hold(self.stream)
            if task.stepped == 0:
                self.diffusion.start(task.slot, task.plan.noise_seed)
        needed = {task: task.plan.reads[task.stepped] for task in tasks}
        for group in range(max(needed.values())):
            slots = [t.slot for t, n in needed.items() if t.extended <= group < n]
            if slots:
                self.conditions.extend(group, slots)
        previews = self.diffusion.step([task.step_row() for task in tasks])
        for task, groups in needed.items():
            task.extended = groups
        return previews


__all__ = ["DiffusionLane", "Lane", "TokenLane"]
