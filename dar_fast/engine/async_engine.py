"""The engine for asyncio: events and results are awaited; the work is in the engine's threads."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any, Self

import torch

from dar_fast.engine.config import EngineConfig
from dar_fast.engine.engine import Engine
from dar_fast.engine.events import Event, Failed, Finished, Result
from dar_fast.engine.handle import Handle
from dar_fast.engine.request import GenerationRequest
from dar_fast.engine.stats import Stats
from dar_fast.models import Prior, Tokenizer


class AsyncHandle:
    """A submitted request: iterate over its events, or await its result; in one event loop.

    It fails where that loop closes before it is done. A task that is cancelled while it waits here
    leaves the request running: `cancel` ends it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()  # None: there are no more
        self._end: asyncio.Future[Finished | Failed] = self._loop.create_future()
        self.handle: Handle

    def _listen(self, event: Event) -> None:
        """Called by the engine's thread."""
        self._loop.call_soon_threadsafe(self._arrive, event)  # raises where the loop is closed

    def _arrive(self, event: Event) -> None:
        self._events.put_nowait(event)
        if isinstance(event, Finished | Failed) and not self._end.done():
            self._end.set_result(event)
            self._events.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events that no other iteration has taken; the last one is Finished or Failed."""
        while (event := await self._events.get()) is not None:
            yield event
        self._events.put_nowait(None)  # other iterations end by it too

    async def result(self) -> Result:
        """The result.

        Raises:
            RequestFailedError, RequestCancelledError, DeadlineError: where there is none.
        """
        end = await asyncio.shield(self._end)
        if isinstance(end, Failed):
            raise end.error
        return end.result

    def cancel(self) -> None:
        """Ask the engine to drop the request at its next boundary."""
        self.handle.cancel()


class AsyncEngine:
    """See `Engine`, whose arguments it takes; `async with` closes it.

    Nothing here blocks the event loop but making the engine.
    """

    def __init__(
        self, prior: Prior, tokenizer: Tokenizer, config: EngineConfig | None = None
    ) -> None:
        self.engine = Engine(prior, tokenizer, config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        config: EngineConfig | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The engine of a folder, or of "demo"; see `Engine.from_pretrained`."""
        made = cls.__new__(cls)
        made.engine = Engine.from_pretrained(path, config, device, dtype)
        return made

    def submit(self, request: GenerationRequest) -> AsyncHandle:
        """Queue a request; call it in the event loop. Raises as `Engine.submit`."""
        mine = AsyncHandle()
        mine.handle = self.engine.submit(request, mine._listen)
        return mine

    def fork(
        self, handle: AsyncHandle, group: int, *, seed: int | None = None, **changes: Any
    ) -> AsyncHandle:
        """See `Engine.fork`."""
        mine = AsyncHandle()
        mine.handle = self.engine.fork(
            handle.handle, group, seed=seed, listener=mine._listen, **changes
        )
        return mine

    async def stream(self, request: GenerationRequest) -> AsyncIterator[Event]:
        """The events of a request; to stop iterating, or a cancelled task, cancels it."""
        mine = self.submit(request)
        try:
            async for event in mine:
                yield event
        finally:
            mine.cancel()

    async def generate(self, request: GenerationRequest) -> Result:
        """The result of a request; a cancelled task cancels it. Raises as `AsyncHandle.result`."""
        mine = self.submit(request)
        try:
            return await mine.result()
        finally:
            mine.cancel()

    def stats(self) -> Stats:
        """See `Engine.stats`."""
        return self.engine.stats()

    async def close(self, drain: bool = False) -> None:
        """See `Engine.close`; the event loop goes on meanwhile."""
        await asyncio.to_thread(self.engine.close, drain)

    async def __aenter__(self) -> Self:
        self.engine.__enter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


__all__ = ["AsyncEngine", "AsyncHandle"]
