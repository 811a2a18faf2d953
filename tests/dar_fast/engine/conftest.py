"""Engines that are closed after a test, whose threads are then gone."""

import threading

import pytest
from engine_helpers import LONG, engine_threads, no_threads_left

from dar_fast.engine import AsyncEngine, Engine, EngineConfig


@pytest.fixture
def make_engine(tiny_pipeline):
    """Makes engines of the tiny pipeline, or of another one."""
    before = set(engine_threads())
    made = []

    def make(parts=None, **config):
        parts = tiny_pipeline if parts is None else parts
        config = {"max_requests": 4, "threads": 1, **config}
        engine = Engine(parts.prior, parts.tokenizer, EngineConfig(**config))
        made.append(engine)
        return engine

    yield make
    while made:
        closer = threading.Thread(target=made.pop().close, daemon=True)
        closer.start()
        closer.join(LONG)
        assert not closer.is_alive(), "close() hangs"
    assert not set(engine_threads()) - before


@pytest.fixture
def engine(make_engine):
    """A small one, deterministic in nothing but codes."""
    return make_engine()


@pytest.fixture
def threads_end():
    """No engine's thread outlives the test."""
    yield
    no_threads_left()


@pytest.fixture
def make_async(tiny_pipeline):
    """Makes engines for asyncio; the test closes them."""

    def make(**config):
        config = EngineConfig(**{"max_requests": 4, "threads": 1, **config})
        return AsyncEngine(tiny_pipeline.prior, tiny_pipeline.tokenizer, config)

    yield make
    no_threads_left()
