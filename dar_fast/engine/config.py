"""How an engine is made."""

from dataclasses import dataclass
from typing import Literal

from dar_fast.config import TokenizerConfig

PriorWeights = Literal["as stored", "as given", "int8", "fp8"]
PageDtype = Literal["as weights", "fp32", "fp16", "bf16", "fp8", "int8"]
PRIOR_WEIGHTS: tuple[PriorWeights, ...] = ("as stored", "as given", "int8", "fp8")
PAGE_DTYPES: tuple[PageDtype, ...] = ("as weights", "fp32", "fp16", "bf16", "fp8", "int8")
MAX_REQUESTS = {"cpu": 16, "cuda": 64}
BATCH_PATCHES = {"cpu": 1024, "cuda": 16_384}  # a diffusion batch: more brings no more speed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Sizes and modes of an engine.

    Args:
        max_requests: candidates in flight at once, each with a slot; None: 16, on a GPU 64.
        max_queue: requests that wait at most.
        num_pages: pages of 32 keys and values a layer; None: enough for max_requests with guidance.
        page_dtype: of these pages; on a CPU "as weights" (fp32 or bf16) only.
        prior_weights: of the prior's products: "as given", as the module has them; "int8" or
            "fp8", one byte each; "as stored": one byte each where the model's folder holds them
            so and the device decodes from that, else as given; `stats` says which.
        diffusion_batch: pictures in one evaluation of the pixel DiT; None: by their patches.
        overlap: draw codes and take solver steps at the same time.
        deterministic: the bits of a picture are the same whoever else is in flight: every picture
            is evaluated in a batch of its own, and on a CPU by as many threads throughout. It costs
            what batching brings, and the cores that the token lane leaves idle.
        threads: processor cores; None: torch.get_num_threads().
        capture: CUDA graphs of the lanes' work, on a GPU.

    Raises:
        TypeError, ValueError: where a value does not fit.
    """

    max_requests: int | None = None
    max_queue: int = 1024
    num_pages: int | None = None
    page_dtype: PageDtype = "as weights"
    prior_weights: PriorWeights = "as stored"
    diffusion_batch: int | None = None
    overlap: bool = True
    deterministic: bool = False
    threads: int | None = None
    capture: bool = True

    def __post_init__(self) -> None:
        for name in ("max_requests", "max_queue", "num_pages", "diffusion_batch", "threads"):
            value = getattr(self, name)
            if value is None and name != "max_queue":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        for name, choices in (("prior_weights", PRIOR_WEIGHTS), ("page_dtype", PAGE_DTYPES)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}: expected one of {list(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("overlap", "deterministic", "capture"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(self, name)!r}")


def pictures_a_batch(
    config: TokenizerConfig, requests: int, diffusion_batch: int | None, device_type: str
) -> int:
    """Pictures in one evaluation of the pixel DiT, of an engine with so many requests."""
    patches = (config.image_size // config.dit.patch_size) ** 2
    return min(requests, diffusion_batch or max(1, BATCH_PATCHES[device_type] // patches))


__all__ = [
    "BATCH_PATCHES", "MAX_REQUESTS", "EngineConfig", "PageDtype", "PriorWeights",
    "pictures_a_batch",
]  # fmt: skip
