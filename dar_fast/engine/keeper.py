"""The engine of a pair of models, made when it is first needed."""

import threading
from collections.abc import Callable
from typing import Any

from dar_fast.engine.config import EngineConfig
from dar_fast.engine.engine import Engine
from dar_fast.models import Prior, Tokenizer
from dar_kernels.dispatch import preferred


class EngineKeeper:
    """Makes the engine anew where the weights have moved, or another implementation is preferred.

    A copy, or what is unpickled, has no engine yet.
    """

    def __init__(self, prior: Prior, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self.prior, self.tokenizer, self.config = prior, tokenizer, config
        self._engine: Engine | None = None
        self._key: object = None
        self._lock = threading.Lock()

    def engine(self) -> Engine:
        """The engine; any thread may ask."""
        parts = (self.prior.head.weight, self.tokenizer.quantizer.codebook)
        key = (preferred(), *((w.data_ptr(), w.dtype, w.device) for w in parts))
        with self._lock:
            if self._engine is None or self._engine.closed or self._key != key:
                self._close()
                self._engine = Engine(self.prior, self.tokenizer, self.config)
                self._key = key
            return self._engine

    def close(self) -> None:
        """Stop the engine's threads and free its memory."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return type(self), (self.prior, self.tokenizer, self.config)


__all__ = ["EngineKeeper"]
