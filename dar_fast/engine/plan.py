"""How much memory an engine takes, from configurations alone: nothing is allocated.

    total = weights + requests·(slot + 2·ceil(N/32) pages + logits) + pictures·activations

Exact: the weights, their copies, pages and slots. From the tensors that live at once: activations
and logits. An estimate, not measured: what captured CUDA graphs hold. Not in it: the CUDA context,
which is gone from what the device calls free, and what an allocator rounds up.

Activations of a batch of b pictures in the pixel DiT, in numbers of the model's dtype, n patches of
width D. At the peak, the MLP of a block, these live: x before and after the first branch, features,
the modulated norm and four parts of the modulation, the branch, the next norm: 10 D a patch; on a
CPU all six parts, 12 D; and the MLP's hidden row of 4 D twice, before and after SiLU, or, where the
product is packed and applies it, once beside the output. With the keys and values of a group that a
block reads, and those that the block before it read, and the picture in fp32:

    b·(n·D·(18 | 20 | 17) + 2·H·Q·(D + Dh)) + b·3·R² fp32
"""

from dataclasses import dataclass, fields

import torch

from dar_fast.config import PriorConfig, TokenizerConfig
from dar_fast.engine.config import pictures_a_batch
from dar_fast.engine.graphs import buckets
from dar_fast.engine.pages import request_pages
from dar_fast.engine.parameters import (
    packed_numbers,
    prior_parameters,
    prior_products,
    tokenizer_parameters,
)
from dar_fast.engine.slots import slot_bytes
from dar_fast.quantization import WeightForm
from dar_kernels.linear import packs
from dar_kernels.pages import LARGEST_CODE, PAGE_SIZE

GiB = 2**30
FLOAT = 4  # bytes of fp32
NODE_BYTES = 2048  # of a captured kernel with its arguments: a guess
MOST_REQUESTS = 2**20  # that `largest_batch` considers


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All that a plan depends on beside the number of requests; see `plan_memory`."""

    prior: PriorConfig
    tokenizer: TokenizerConfig
    dtype: torch.dtype
    weights_dtype: WeightForm
    page_dtype: torch.dtype
    diffusion_batch: int | None
    device_type: str
    num_pages: int | None
    capture: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes by part."""

    prior: int  # its parameters, embeddings too
    tokenizer: int  # quantizer, token decoder and pixel DiT: what sampling reads
    encoder: int  # with proj_in and the REPA head: loaded, not read
    packed: int  # the pixel DiT's products in oneDNN's order: bf16 on a CPU
    prior_copies: int  # one byte a weight and scales; on a CPU fp32 of fp16 weights, and of norms
    pages: int  # keys and values, with scales
    slots: int  # state of the requests in flight
    activations: int  # of the diffusion lane at its peak
    logits: int  # of the token lane
    graphs: int  # captured graphs, an estimate
    max_requests: int
    sizes: Sizes

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        names = [f.name for f in fields(self) if f.name not in ("max_requests", "sizes")]
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def loaded(self) -> int:
        """What a pipeline takes before there is an engine."""
        return self.prior + self.tokenizer + self.encoder + self.packed


def page_bytes(config: PriorConfig, dtype: torch.dtype) -> int:
    """One page of 32 keys and values in every layer, with scales where the dtype has them."""
    row = config.head_dim * dtype.itemsize + (FLOAT if dtype in LARGEST_CODE else 0)
    return 2 * config.depth * config.key_value_heads * PAGE_SIZE * row


def _prior_copies(sizes: Sizes) -> int:
    weights, channels = prior_products(sizes.prior)
    on_cpu = sizes.device_type == "cpu"
    norms = (2 * sizes.prior.depth + 1) * sizes.prior.dim
    copies = 0
    if sizes.weights_dtype != "as given":
        copies += weights + FLOAT * channels
    elif on_cpu and sizes.dtype == torch.float16:
        copies += FLOAT * weights
    if on_cpu and sizes.dtype != torch.float32:
        copies += FLOAT * norms
    if on_cpu and sizes.dtype == torch.float16:
        copies += FLOAT * sizes.prior.vocab_size * sizes.prior.dim  # the embedding
    return copies


def dit_activations(config: TokenizerConfig, batch: int, dtype: torch.dtype, device: str) -> int:
    """Bytes that live at the peak of one evaluation of the pixel DiT; see the module."""
    dit, R = config.dit, config.image_size
    D, n = dit.dim, (R // dit.patch_size) ** 2
    packed = device == "cpu" and packs(torch.empty(0, 0, dtype=dtype))
    width = 18 if device != "cpu" else 17 if packed else 20
    group = 2 * D // dit.head_dim * config.group_size * (D + dit.head_dim)
    return batch * ((n * D * width + group) * dtype.itemsize + FLOAT * 3 * R * R)


def _conditions(config: TokenizerConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes that live while a group passes a layer of the token decoder: its cache, 14 Q D more."""
    D = config.decoder_dim
    return batch * dtype.itemsize * D * (2 * config.num_tokens + 14 * config.group_size)


def _solver(config: TokenizerConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes that live in a solver step behind the network: nine pictures as torch does it."""
    return batch * 3 * config.image_size**2 * (9 * FLOAT + dtype.itemsize)


def _batch(sizes: Sizes, requests: int) -> int:
    """Pictures in one evaluation of the pixel DiT."""
    return pictures_a_batch(sizes.tokenizer, requests, sizes.diffusion_batch, sizes.device_type)


def _graphs(sizes: Sizes, requests: int, logits: int, activations: int) -> int:
    """What the graphs' pools keep, again what a lane needs, and the kernels they are made of."""
    if sizes.device_type != "cuda" or not sizes.capture:
        return 0
    step, Q, dit = 6 * sizes.prior.depth + 7, sizes.tokenizer.group_size, sizes.tokenizer.dit
    tokens = len(buckets(requests)) * step * Q
    pictures = len(buckets(_batch(sizes, requests))) * 30 * dit.depth
    return logits + activations + NODE_BYTES * (tokens + pictures)


def _plan(sizes: Sizes, requests: int) -> MemoryPlan:
    prior, tokenizer, itemsize = sizes.prior, sizes.tokenizer, sizes.dtype.itemsize
    read, other = tokenizer_parameters(tokenizer)
    pages = sizes.num_pages or requests * request_pages(prior.num_tokens, 2)
    activations = max(
        dit_activations(tokenizer, _batch(sizes, requests), sizes.dtype, sizes.device_type),
        _solver(tokenizer, _batch(sizes, requests), sizes.dtype),
        _conditions(tokenizer, requests, sizes.dtype),
    )
    rounded = 0 if sizes.device_type == "cpu" or itemsize == FLOAT else itemsize
    logits = 2 * requests * prior.vocab_size * (FLOAT + rounded)
    packing = sizes.device_type == "cpu" and packs(torch.empty(0, 0, dtype=sizes.dtype))
    return MemoryPlan(
        prior=prior_parameters(prior) * itemsize,
        tokenizer=read * itemsize,
        encoder=other * itemsize,
        packed=packed_numbers(tokenizer.dit) * itemsize if packing else 0,
        prior_copies=_prior_copies(sizes),
        pages=pages * page_bytes(prior, sizes.page_dtype),
        slots=sum(slot_bytes(tokenizer, requests, sizes.dtype).values()),
        activations=activations,
        logits=logits,
        graphs=_graphs(sizes, requests, logits, activations),
        max_requests=requests,
        sizes=sizes,
    )


def plan_memory(
    prior_config: PriorConfig,
    tokenizer_config: TokenizerConfig,
    *,
    max_requests: int,
    dtype: torch.dtype,
    weights_dtype: WeightForm = "as given",
    page_dtype: torch.dtype | None = None,
    diffusion_batch: int | None = None,
    device_type: str = "cuda",
    num_pages: int | None = None,
    capture: bool = True,
) -> MemoryPlan:
    """What an engine of `max_requests` requests in flight takes.

    Args:
        prior_config, tokenizer_config: the models.
        max_requests: requests in flight, each with a slot and, unless `num_pages` says otherwise,
            the pages of two rows.
        dtype: of the modules' weights: fp32, bf16 or fp16.
        weights_dtype: of the prior's products; one-byte copies are beside the module's own.
        page_dtype: None: as the weights, on a CPU fp32 or bf16.
        diffusion_batch: pictures in one evaluation; None: by their patches.
        device_type: "cpu" or "cuda".
        num_pages: None: of all requests, guided.
        capture: CUDA graphs, on a GPU.

    Raises:
        ValueError: where `max_requests` is below 1.
    """
    if max_requests < 1:
        raise ValueError(f"max_requests: expected an integer >= 1, got {max_requests!r}")
    if page_dtype is None:
        on_cpu = device_type == "cpu" and dtype != torch.float32
        page_dtype = torch.bfloat16 if on_cpu else dtype
    sizes = Sizes(
        prior=prior_config, tokenizer=tokenizer_config, dtype=dtype, weights_dtype=weights_dtype,
        page_dtype=page_dtype, diffusion_batch=diffusion_batch, device_type=device_type,
        num_pages=num_pages, capture=capture,
    )  # fmt: skip
    return _plan(sizes, max_requests)


def largest_batch(plan: MemoryPlan, budget_bytes: int) -> int:
    """Most requests in flight whose plan, alike in all else, fits; 0 where one does not fit."""
    low, high = 0, MOST_REQUESTS
    while low < high:
        middle = (low + high + 1) // 2
        if _plan(plan.sizes, middle).total <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


def check_fits(plan: MemoryPlan, available: int, *, loaded: bool = False) -> None:
    """Raise ValueError unless the plan fits; `loaded`: the models are not in `available` any more.

    Args:
        plan: of the engine.
        available: bytes; see `available_memory`.
    """
    room = available + (plan.loaded if loaded else 0)
    if plan.total > room:
        most = largest_batch(plan, room)
        raise ValueError(
            f"max_requests: expected at most {most}, which fit in {room / GiB:.1f} GiB, got "
            f"{plan.max_requests}, which take {plan.total / GiB:.1f} GiB"
        )


__all__ = [
    "MemoryPlan", "Sizes", "check_fits", "dit_activations", "largest_batch", "page_bytes",
    "plan_memory",
]  # fmt: skip
