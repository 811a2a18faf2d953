"""The one path from a request to pictures, step by step: calls and streams are both made of it.

A solver step runs as soon as the group of codes that it reads is complete, so the previews of a
picture cost the S network evaluations of the picture itself. Source: arXiv 2505.23660, §3.
"""

import itertools
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dar_fast.flow import Trajectory
from dar_fast.models import Prior, Tokenizer
from dar_fast.request import Request


class Parts(Protocol):
    """What draws: a pipeline."""

    prior: Prior
    tokenizer: Tokenizer


class Frame(NamedTuple):
    """The batch after a step; behind the last step comes one frame more, the result."""

    step: int  # steps done
    codes: Tensor  # [B, n]
    estimate: Tensor | None  # [B, 3, R, R] in image units; None for output_type "codes"
    final: bool


@torch.no_grad()
def draw_frames(parts: Parts, request: Request) -> Iterator[Frame]:
    """Draw a group, extend the conditions by it, take every step that can read now; and so on.

    `parts` goes to the callback as it is.
    """
    tokenizer, S, Q = parts.tokenizer, request.num_steps, parts.tokenizer.config.group_size
    batch = len(request.seeds)
    run: Trajectory | None = None
    if request.output_type != "codes":
        run = tokenizer.trajectory(tokenizer.noise(request.seeds, batch), S, request.solver)
    groups = parts.prior.generation(
        request.labels, request.sampling, request.seeds, request.prefix_codes, chunk=Q
    )
    codes = torch.empty(batch, 0, dtype=torch.int64, device=tokenizer.device)
    D = tokenizer.config.decoder_dim
    conditions = torch.empty(batch, 0, D, device=tokenizer.device, dtype=tokenizer.dtype)
    cache = tokenizer.token_decoder.cache(batch)
    step = 0
    for group in itertools.islice(groups, request.num_groups):
        codes = torch.cat((codes, group), dim=1)
        if run is not None:
            embedded = tokenizer.quantizer.embed(group)
            extended = tokenizer.token_decoder.extend(embedded, cache, conditions.shape[1])
            conditions = torch.cat((conditions, extended), dim=1)
        while step < S and tokenizer.group_start(step, S) + Q <= codes.shape[1]:
            if run is not None:
                tokenizer.advance(run, conditions)
                _call_back(parts, request, run, codes)
            step += 1
            yield Frame(step, codes, None if run is None else run.preview(), False)
    estimate = None
    if run is not None:
        estimate = run.preview() if request.early else run.image()
    yield Frame(step, codes, estimate, True)


def _call_back(parts: Parts, request: Request, run: Trajectory, codes: Tensor) -> None:
    """Call the caller's function after a step; go on from the latents that it returns, if any."""
    if request.callback is None:
        return
    done = run.step - 1
    values = {"latents": run.x.clone(), "preview": run.preview(), "codes": codes}
    answer = request.callback(parts, done, run.times[done], values)
    if answer is None:
        return
    if not isinstance(answer, Mapping):
        raise TypeError(
            f"callback_on_step_end: expected a dict or None, got {type(answer).__name__}"
        )
    latents = answer.get("latents", run.x)
    if not isinstance(latents, Tensor) or latents.shape != run.x.shape:
        raise ValueError(
            f"callback_on_step_end: expected latents {list(run.x.shape)}, "
            f"got {list(getattr(latents, 'shape', []))}"
        )
    run.x.copy_(latents)


__all__ = ["Frame", "draw_frames"]
