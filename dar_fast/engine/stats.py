"""What an engine has done and holds."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counts since the engine started, and what it holds now; seconds by wall clock."""

    decode_step: str = ""  # the implementation that draws codes
    prior_weights: str = ""  # "as given", or one byte each
    queued: int = 0  # requests that wait now
    running: int = 0  # candidates that hold a slot now
    pages_used: int = 0
    pages: int = 0
    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    refused: int = 0  # at submission: impossible, or the queue was full
    groups: int = 0  # drawn, of all requests
    group_batches: int = 0  # calls that drew them
    steps: int = 0  # solver steps, of all requests
    step_batches: int = 0
    retries: int = 0  # batches that failed and were run again in halves
    tokens_seconds: float = 0.0  # that the token lane was at work
    diffusion_seconds: float = 0.0


@dataclass(slots=True)
class Counts:
    """The running sums of `Stats`."""

    values: Stats = field(default_factory=Stats)

    def add(self, **amounts: float) -> None:
        """Add to counts by name."""
        self.values = replace(
            self.values, **{k: getattr(self.values, k) + v for k, v in amounts.items()}
        )


__all__ = ["Counts", "Stats"]
