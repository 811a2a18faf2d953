"""The engine: many requests, one machine, no picture changed by its neighbours."""

from dar_fast.engine.async_engine import AsyncEngine, AsyncHandle
from dar_fast.engine.config import EngineConfig
from dar_fast.engine.engine import Engine
from dar_fast.engine.errors import (
    AdmissionError,
    DeadlineError,
    EngineClosedError,
    EngineError,
    QueueFullError,
    RequestCancelledError,
    RequestFailedError,
)
from dar_fast.engine.events import Chosen, Event, Failed, Finished, GroupDrawn, Preview, Result
from dar_fast.engine.handle import Handle
from dar_fast.engine.request import BestOf, Candidates, GenerationRequest
from dar_fast.engine.stats import Stats

__all__ = [
    "AdmissionError", "AsyncEngine", "AsyncHandle", "BestOf", "Candidates", "Chosen",
    "DeadlineError", "Engine", "EngineClosedError", "EngineConfig", "EngineError", "Event",
    "Failed", "Finished", "GenerationRequest", "GroupDrawn", "Handle", "Preview",
    "QueueFullError", "RequestCancelledError", "RequestFailedError", "Result", "Stats",
]  # fmt: skip
