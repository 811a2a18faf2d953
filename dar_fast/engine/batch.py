"""A batch of pictures with shared settings, as the pipeline takes it, through an engine."""

from collections.abc import Iterator

import torch

from dar_fast.engine.engine import Engine
from dar_fast.engine.errors import QueueFullError, RequestFailedError
from dar_fast.engine.events import Event, Failed, GroupDrawn, Preview
from dar_fast.engine.handle import Handle
from dar_fast.engine.request import GenerationRequest
from dar_fast.frames import Frame
from dar_fast.request import Request


def batch_frames(engine: Engine, request: Request, previews: bool) -> Iterator[Frame]:
    """The batch after every step where `previews` are asked for, then the result, on the CPU.

    A frame comes when the slowest picture has it. To stop iterating cancels what is left.

    Raises:
        Exception: what made a picture fail, as it was raised.
        EngineError: where the engine is closed, or others fill its queue.
    """
    codes_only = request.output_type == "codes"
    handles: list[Handle] = []
    try:
        for i, seed in enumerate(request.seeds):
            given = () if request.prefix_codes is None else request.prefix_codes[i]
            one = GenerationRequest(
                label=int(request.labels[i]), seed=seed, sampling=request.sampling,
                num_steps=request.num_steps, solver=request.solver, prefix_codes=given,
                num_groups=request.num_groups, previews=previews,
                output="codes" if codes_only else "image",
            )  # fmt: skip
            handles.append(_submit(engine, one, handles))
        events = [iter(handle) for handle in handles]
        step = 0
        if previews:
            frames = (
                _code_frames(events, request, engine) if codes_only else _preview_frames(events)
            )
            for frame in frames:
                step = frame.step
                yield frame
        yield _result(handles, step)
    except RequestFailedError as error:
        if isinstance(error.__cause__, Exception):
            raise error.__cause__ from error
        raise
    finally:
        for handle in handles:
            handle.cancel()


def _submit(engine: Engine, request: GenerationRequest, before: list[Handle]) -> Handle:
    """Queue one, behind those of its own batch where these fill the queue."""
    while True:
        try:
            return engine.submit(request)
        except QueueFullError:
            waiting = next((handle for handle in before if not handle.done), None)
            if waiting is None:
                raise
            waiting.result()


def _next(events: list[Iterator[Event]]) -> list[Event]:
    """The next event of every picture."""
    taken: list[Event] = []
    for own in events:
        event = next(own)
        if isinstance(event, Failed):
            raise event.error
        taken.append(event)
    return taken


def _preview_frames(events: list[Iterator[Event]]) -> Iterator[Frame]:
    while True:
        previews = [event for event in _next(events) if isinstance(event, Preview)]
        if not previews:
            return
        images = torch.stack([preview.image for preview in previews])
        codes = torch.stack([preview.codes for preview in previews])
        yield Frame(previews[0].step, codes, images, False)


def _code_frames(
    events: list[Iterator[Event]], request: Request, engine: Engine
) -> Iterator[Frame]:
    """A frame for every step whose codes are there, though no step is taken."""
    tokenizer = engine.tokenizer
    S, Q, step = request.num_steps, tokenizer.config.group_size, 0
    codes = torch.empty(len(events), 0, dtype=torch.int64)
    for _ in range(request.num_groups):
        groups = [event.codes for event in _next(events) if isinstance(event, GroupDrawn)]
        codes = torch.cat((codes, torch.stack(groups)), dim=1)
        while step < S and tokenizer.group_start(step, S) + Q <= codes.shape[1]:
            step += 1
            yield Frame(step, codes, None, False)


def _result(handles: list[Handle], step: int) -> Frame:
    results = [handle.result() for handle in handles]
    images = [result.image for result in results if result.image is not None]
    codes = torch.stack([result.codes for result in results])
    return Frame(step, codes, torch.stack(images) if images else None, True)


__all__ = ["batch_frames"]
