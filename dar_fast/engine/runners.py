"""Which parts an engine runs on: C++ on a CPU, captured ops on a GPU, each by name in `stats`."""

import torch

from dar_fast.engine.config import EngineConfig, PageDtype
from dar_fast.engine.graph_tokens import GraphTokens
from dar_fast.engine.graphs import Capture, NoCapture, capture_for
from dar_fast.engine.launcher import GraphLauncher
from dar_fast.engine.rows import TokenRunner
from dar_fast.engine.slots import Direct, Launcher, SlotState
from dar_fast.engine.tokens import NativeTokens
from dar_fast.models import Prior
from dar_fast.quantization import WeightForm, engine_weights
from dar_kernels.decode_step import OP
from dar_kernels.dispatch import UnavailableError

DTYPES: dict[PageDtype, torch.dtype | None] = {
    "as weights": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn, "int8": torch.int8,
}  # fmt: skip

NATIVE_PAGES: tuple[PageDtype, ...] = ("as weights", "fp32", "bf16")


def capture_of(device: torch.device, config: EngineConfig) -> Capture:
    """How work is captured on a device; each lane has one of its own."""
    return capture_for(device) if config.capture else NoCapture()


def token_runner(
    prior: Prior, state: SlotState, pages: int, config: EngineConfig, prior_weights: WeightForm
) -> tuple[str, TokenRunner]:
    """What draws: `decode_step`'s implementation that is preferred, or the first that can run.

    Raises:
        TypeError, ValueError: where pages or weights cannot be.
        UnavailableError: where the device has no kernels for them.
    """
    weights = engine_weights(prior, prior_weights)
    chosen = OP.pick(prior.device.type, prior.head.weight.dtype)
    page_dtype = DTYPES[config.page_dtype]
    if chosen == "native":
        if config.page_dtype not in NATIVE_PAGES:
            raise UnavailableError(
                f"page_dtype: expected one of {list(NATIVE_PAGES)} with decode_step's native "
                f"implementation, got {config.page_dtype!r}, which needs a CUDA device"
            )
        return chosen, NativeTokens(
            prior, state.codes, pages, weights=weights, page_dtype=page_dtype
        )
    return chosen, GraphTokens(
        prior, state.codes, pages, group_size=state.config.group_size, spare=state.padding,
        largest=state.slots, weights=weights, page_dtype=page_dtype,
        capture=capture_of(prior.device, config), implementation=chosen,
    )  # fmt: skip


def launcher(state: SlotState, batch: int, config: EngineConfig) -> Launcher:
    """How the diffusion lane's work is run."""
    capture = capture_of(state.device, config)
    if isinstance(capture, NoCapture):
        return Direct()
    return GraphLauncher(capture, batch, state.padding)


__all__ = ["capture_of", "launcher", "token_runner"]
