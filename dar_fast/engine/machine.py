"""What an engine is made of on its device: state, runners, lanes; and how it stops."""

import atexit
import contextlib
import threading
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from dar_fast.engine.board import Board
from dar_fast.engine.conditions import Conditions
from dar_fast.engine.config import MAX_REQUESTS, EngineConfig, pictures_a_batch
from dar_fast.engine.cores import Cores
from dar_fast.engine.diffusion import Diffusion
from dar_fast.engine.graph_tokens import GraphTokens
from dar_fast.engine.graphs import GraphReport
from dar_fast.engine.lanes import DiffusionLane, Lane, TokenLane
from dar_fast.engine.launcher import GraphLauncher
from dar_fast.engine.memory import available_memory
from dar_fast.engine.pages import PagePool, request_pages
from dar_fast.engine.plan import check_fits, largest_batch, plan_memory
from dar_fast.engine.runners import DTYPES, launcher, token_runner
from dar_fast.engine.scheduler import Scheduler
from dar_fast.engine.scoring import scorers
from dar_fast.engine.slots import SlotState
from dar_fast.engine.stats import Stats
from dar_fast.engine.streams import Streams
from dar_fast.models import Prior, Tokenizer
from dar_fast.models.pair import check_pair
from dar_fast.quantization import WeightForm, stored_form


def _requests(
    prior: Prior, tokenizer: Tokenizer, config: EngineConfig, prior_weights: WeightForm
) -> int:
    """Requests in flight: as configured, where they fit; by default at most half of what is free.

    Raises:
        ValueError: where the memory of the device does not hold them; the message says how many.
    """
    device = tokenizer.device
    if device.type not in MAX_REQUESTS:
        raise ValueError(f"engine: expected a device of {list(MAX_REQUESTS)}, got {device}")
    wanted = config.max_requests or MAX_REQUESTS[device.type]
    plan = plan_memory(
        prior.config, tokenizer.config, max_requests=wanted, dtype=tokenizer.dtype,
        weights_dtype=prior_weights, page_dtype=DTYPES[config.page_dtype],
        diffusion_batch=config.diffusion_batch, device_type=device.type,
        num_pages=config.num_pages, capture=config.capture,
    )  # fmt: skip
    try:
        available = available_memory(device)
    except OSError:  # a system that does not say: allocation will tell
        return wanted
    if config.max_requests is None and config.num_pages is None:
        return max(1, min(wanted, largest_batch(plan, plan.loaded + available // 2)))
    check_fits(plan, available, loaded=True)
    return wanted


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Machine:
    """The lanes of one engine and what they work on; knows nothing of the engine itself."""

    def __init__(self, prior: Prior, tokenizer: Tokenizer, config: EngineConfig) -> None:
        check_pair(prior, tokenizer)
        self.prior_weights: WeightForm = (
            stored_form(prior) if config.prior_weights == "as stored" else config.prior_weights
        )
        prior.eval()
        tokenizer.eval()
        device = tokenizer.device
        kind = device.type
        slots = _requests(prior, tokenizer, config, self.prior_weights)
        pages = config.num_pages or slots * request_pages(prior.config.num_tokens, 2)
        batch = pictures_a_batch(tokenizer.config, slots, config.diffusion_batch, kind)
        state = SlotState(tokenizer, slots)
        self.streams = Streams(device)
        scheduler = Scheduler(PagePool(pages), slots, config.max_queue, tokenizer.config.group_size)
        self.board = Board(scheduler, scorers(prior))
        threads = config.threads or torch.get_num_threads()
        cores = Cores(threads, config.deterministic) if kind == "cpu" else None
        turn = contextlib.nullcontext() if config.overlap else threading.Lock()
        largest = 1 if config.deterministic else batch
        work = launcher(state, largest, config)
        conditions = Conditions(tokenizer, state, config.deterministic, work)
        diffusion = Diffusion(
            tokenizer, state, config.deterministic, work, cores.adjust if cores else None
        )
        self.implementation, runner = token_runner(prior, state, pages, config, self.prior_weights)
        self.memory = {
            "prior": _bytes(prior.parameters()),
            "tokenizer": _bytes(tokenizer.parameters()),
            "slots": sum(state.bytes.values()),
            "pages": _bytes(part for part in runner.pages if part is not None),
        }
        self.lanes: list[Lane] = [
            TokenLane(self.board, self.streams, turn, runner, state.codes, cores),
            DiffusionLane(self.board, self.streams, turn, conditions, diffusion, batch, cores),
        ]
        self.threads = [lane.thread for lane in self.lanes] + [self.board.delivery.thread]
        self._reports = [
            part.report for part in (runner, work) if isinstance(part, GraphTokens | GraphLauncher)
        ]
        self._seconds = (0.0, 0.0)
        self._closing = threading.Lock()
        if kind == "cuda":
            torch.cuda.synchronize(device)  # the lanes' streams do not wait for the default one
        for thread in self.threads:
            thread.start()
        atexit.register(self.close)  # a thread that still computes would crash the exit

    def stats(self) -> Stats:
        """Of the board, with the time that the lanes were at work."""
        tokens, diffusion = [lane.seconds for lane in self.lanes] or self._seconds
        return replace(
            self.board.stats(),
            decode_step=self.implementation,
            prior_weights=self.prior_weights,
            tokens_seconds=tokens,
            diffusion_seconds=diffusion,
        )

    def graphs(self) -> list[GraphReport]:
        """Of both lanes."""
        return [graph for report in self._reports for graph in report()]

    def close(self, drain: bool = False) -> None:
        """Stop, wait until the threads are gone, free what they had; a listener does not wait."""
        self.board.close(drain)
        if threading.current_thread() not in self.threads:
            for thread in self.threads:
                thread.join()
            atexit.unregister(self.close)
            with self._closing:
                if self.lanes:
                    self._seconds = self.lanes[0].seconds, self.lanes[1].seconds
                    self.lanes, self._reports = [], []  # and with them slots, pages and graphs

    def abandon(self) -> None:
        """Close, and wait for nothing: the collector may call it in a thread that holds locks."""
        if self.lanes:  # else it is closed, perhaps by an interpreter that ends
            threading.Thread(target=self.close, name="dar closing").start()


__all__ = ["Machine"]
