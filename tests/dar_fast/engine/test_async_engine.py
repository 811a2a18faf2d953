"""The engine through asyncio: streams, results, cancelled tasks, loops that close."""

import asyncio
import threading
import time

import pytest
from engine_helpers import (
    LONG,
    as_prefixed,
    check_events,
    check_result,
    codes_request,
    held,
    idle,
    image_request,
    plain,
    until,
)

from dar_fast.engine import (
    AsyncEngine,
    EngineClosedError,
    EngineConfig,
    Finished,
    GroupDrawn,
    Preview,
    QueueFullError,
    RequestCancelledError,
)

Q = 4


def run(main):
    """A coroutine to its end, in a loop of its own."""
    return asyncio.run(asyncio.wait_for(main, LONG))


async def told(engine, request):
    return [event async for event in engine.stream(request)]


async def become(condition):
    while not condition():
        await asyncio.sleep(0.001)


def test_many_streams_at_once(tiny_pipeline, make_async):
    requests = [image_request(i % 6, i, previews=i % 3 > 0, num_steps=1 + i % 7) for i in range(24)]
    requests += [codes_request(i % 6, i, previews=True) for i in range(24)]

    async def main():
        async with make_async() as engine:
            events = await asyncio.gather(*(told(engine, request) for request in requests))
            await asyncio.to_thread(idle, engine.engine)
            return events

    for events, request in zip(run(main()), requests, strict=True):
        check_events(events, plain(tiny_pipeline, request), request, Q)


def test_results_and_forks(tiny_pipeline, make_async):
    parent = image_request(1, 3, num_steps=6)

    async def main():
        async with make_async() as engine:
            handle = engine.submit(parent)
            fork = engine.fork(handle, 2, seed=9)
            results = await asyncio.gather(
                handle.result(), fork.result(), engine.generate(codes_request(2, 5))
            )
            assert await handle.result() is results[0]
            assert engine.stats().finished == 3
            return results

    results = run(main())
    wanted = plain(tiny_pipeline, parent)
    check_result(results[0], wanted)
    asked = as_prefixed(image_request(1, 9, num_steps=6), wanted, 2, Q)
    check_result(results[1], plain(tiny_pipeline, asked, 3))
    check_result(results[2], plain(tiny_pipeline, codes_request(2, 5)))


def test_two_readers_of_one_request_both_end(make_async):
    async def main():
        async with make_async() as engine:
            with held(engine.engine) as gate:
                handle = engine.submit(image_request(previews=True))

                async def read():
                    return [event async for event in handle]

                readers = [asyncio.create_task(read()) for _ in range(3)]
                await asyncio.sleep(0)
                gate.open.set()
                taken = [event for events in await asyncio.gather(*readers) for event in events]
            assert [event async for event in handle] == []
            return taken

    taken = run(main())
    assert sum(isinstance(event, Preview) for event in taken) == 4
    assert sum(isinstance(event, Finished) for event in taken) == 1


@pytest.mark.parametrize("how", ["generate", "stream"])
def test_a_cancelled_task_cancels_its_request(tiny_pipeline, make_async, how):
    other = image_request(2, 8, previews=True)

    async def main():
        async with make_async(max_requests=2) as engine:
            with held(engine.engine) as gate:
                asked = image_request(previews=True)
                work = engine.generate(asked) if how == "generate" else told(engine, asked)
                task = asyncio.create_task(work)
                beside = asyncio.create_task(told(engine, other))
                await asyncio.to_thread(gate.wait)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await become(lambda: engine.stats().cancelled == 1)
                gate.open.set()
                events = await beside
            await asyncio.to_thread(idle, engine.engine)
            return events

    check_events(run(main()), plain(tiny_pipeline, other), other, Q)


def test_waiting_for_a_handle_may_be_cancelled_alone(tiny_pipeline, make_async):
    request = image_request()

    async def main():
        async with make_async() as engine:
            with held(engine.engine) as gate:
                handle = engine.submit(request)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(handle.result(), 0.01)
                gate.open.set()
                return await handle.result()

    check_result(run(main()), plain(tiny_pipeline, request))


def test_a_cancelled_handle(make_async):
    async def main():
        async with make_async() as engine:
            with held(engine.engine) as gate:
                handle = engine.submit(image_request())
                await asyncio.to_thread(gate.wait)
                handle.cancel()
                with pytest.raises(RequestCancelledError):
                    await handle.result()
                gate.open.set()

    run(main())


def test_a_stream_that_is_left_early_cancels(make_async):
    async def main():
        async with make_async() as engine:
            stream = engine.stream(codes_request(previews=True))
            assert isinstance(await anext(stream), GroupDrawn)
            await stream.aclose()
            await asyncio.to_thread(idle, engine.engine)
            stats = engine.stats()
            assert stats.cancelled + stats.finished == 1  # it may have been done already

    run(main())


def test_the_loop_goes_on_while_the_engine_works(make_async):
    """Nothing that waits, closing included, holds the loop: it ticks while a batch stands still."""
    ticks = []

    async def tick():
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.001)

    async def main():
        ticker = asyncio.create_task(tick())
        engine = make_async()
        with held(engine.engine) as gate:
            task = asyncio.create_task(engine.generate(image_request()))
            await asyncio.to_thread(gate.wait)
            for wait in (lambda: asyncio.sleep(0.05), engine_closing(engine)):
                before = len(ticks)
                waiting = asyncio.ensure_future(wait())
                await become(lambda before=before: len(ticks) > before + 5)
                assert not task.done()
                if wait.__name__ == "closing":
                    gate.open.set()
                await waiting
        await task
        ticker.cancel()

    run(main())


def engine_closing(engine):
    async def closing():
        await engine.close(drain=True)

    return closing


def test_a_loop_that_closes_takes_only_its_own_requests(tiny_pipeline):
    """Its request fails where it is told next; those of another loop go on."""
    config = EngineConfig(max_requests=4, threads=1)
    engine = AsyncEngine(tiny_pipeline.prior, tiny_pipeline.tokenizer, config)
    other = image_request(2, 8, previews=True)
    lost, results = [], []
    try:
        with held(engine.engine) as gate:

            async def leave():
                lost.append(engine.submit(codes_request(previews=True)))

            async def stay():
                results.extend(await told(engine, other))

            asyncio.run(leave())
            staying = threading.Thread(target=lambda: run(stay()))
            staying.start()
            until(lambda: engine.stats().submitted == 2)
            gate.open.set()
            staying.join(LONG)
        check_events(results, plain(tiny_pipeline, other), other, Q)
        idle(engine.engine)
        assert (engine.stats().failed, engine.stats().finished) == (1, 1)
    finally:
        run(engine.close())


def test_errors_come_at_once(make_async):
    async def main():
        engine = make_async(max_requests=1, max_queue=1)
        with pytest.raises(ValueError, match="label"):
            await engine.generate(image_request(99))
        with held(engine.engine) as gate:
            first = engine.submit(codes_request())
            await asyncio.to_thread(gate.wait)
            engine.submit(codes_request())
            with pytest.raises(QueueFullError):
                await engine.generate(codes_request())
            gate.open.set()
            await first.result()
        await engine.close()
        await engine.close()
        with pytest.raises(EngineClosedError):
            engine.submit(codes_request())
        with pytest.raises(EngineClosedError):
            async with engine:
                pass

    run(main())
