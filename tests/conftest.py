"""What the tests share: a pipeline small enough that a picture takes milliseconds."""

import os
import sys
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when the kernels are imported

from dar_fast import DARPipeline
from dar_fast.engine import AsyncEngine, Engine, EngineConfig
from engine_threads import CLOSING, engine_threads
from tiny_models import make_tiny_pipeline

settings.register_profile(
    "dar_fast",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],  # of a busy machine
)
settings.load_profile("dar_fast")

THREADS = torch.get_num_threads()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for the tiny models, which a second one only slows down; all for full sizes.

    No compiled graph of another test.
    """
    torch.set_num_threads(THREADS if item.get_closest_marker("slow") else 1)
    if "torch._dynamo" in sys.modules:  # all functools.partial share its limit of 8
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def tiny_pipeline() -> DARPipeline:
    """Shared by all tests: do not change it."""
    return make_tiny_pipeline()


@pytest.fixture
def fresh_pipeline() -> DARPipeline:
    """One of its own, to change or to save."""
    return make_tiny_pipeline()


@pytest.fixture
def no_new_threads():
    """What a test made of engines is gone behind it."""
    before = engine_threads()
    yield
    end = time.monotonic() + CLOSING
    while engine_threads() - before and time.monotonic() < end:
        time.sleep(0.001)
    assert not engine_threads() - before


@pytest.fixture
def make_engine(no_new_threads, tiny_pipeline):
    """Makes engines of the tiny pipeline, or of another one; they are closed behind the test."""
    made = []

    def make(parts=None, **config):
        parts = tiny_pipeline if parts is None else parts
        config = EngineConfig(**{"max_requests": 4, "threads": 1, **config})
        made.append(Engine(parts.prior, parts.tokenizer, config))
        return made[-1]

    yield make
    for engine in made:
        closer = threading.Thread(target=engine.close, daemon=True)
        closer.start()
        closer.join(CLOSING)
        assert not closer.is_alive(), "close() hangs"


@pytest.fixture
def engine(make_engine):
    """A small one."""
    return make_engine()


@pytest.fixture
def make_async(no_new_threads, tiny_pipeline):
    """Makes engines for asyncio; the test closes them."""

    def make(**config):
        config = EngineConfig(**{"max_requests": 4, "threads": 1, **config})
        return AsyncEngine(tiny_pipeline.prior, tiny_pipeline.tokenizer, config)

    return make
