"""A whole step by ops, draw included, reads nothing back: it can be captured in a CUDA graph."""

from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from decoders import Settings, Shape, clone, make_pages, make_settings, make_weights
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from truth import DEVICE, TRITON

from dar_kernels import guided_sample
from dar_kernels.checks import values_unread
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.decoder_weights import DecoderPages, DecoderWeights

WAYS = ["torch", *["triton"] * TRITON]
SMALL = Shape(layers=1, D=32, heads=2, kv_heads=1, F=24, V=20, N=64)
BYTES = [None, torch.int8, torch.float8_e4m3fn]
OWNER = [0, 1, 2, 2, 0]  # request of each row: request 1 is unguided
UNCOND = [4, 1, 3]  # its own row where a request is unguided, at scale 1


class NoReads(TorchDispatchMode):
    """Fails on what a captured graph cannot hold; a custom op is one operation to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            reads = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if reads or name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero"):
            raise AssertionError(f"reads back: {name}")
        return func(*args, **(kwargs or {}))


class State(NamedTuple):
    """What lies still while a graph is replayed."""

    weights: DecoderWeights
    x: Tensor  # [R, D]
    pages: DecoderPages
    table: Tensor
    positions: Tensor  # [R]
    owner: Tensor  # [R]
    uncond: Tensor  # [B]
    options: Settings
    codes: Tensor  # [B]


def make_state(stored, device, dtype=torch.float32) -> State:
    """Weights and pages both `stored` in one byte, or in `dtype`."""
    weights = make_weights(SMALL, dtype)
    weights = weights if stored is None else weights.quantize(stored)
    pages, table = make_pages(weights, len(OWNER), stored or dtype)
    x = torch.randn(len(OWNER), SMALL.D, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = make_settings(3, 1)
    options = options._replace(guidance=torch.tensor([3.0, 1.0, 2.0]))
    owner = torch.tensor(OWNER)
    positions = torch.tensor([0, 31, 40])[owner]
    return State(
        weights.map(lambda t: t.to(device)),
        x.to(device),
        clone(pages, device=device),
        *(t.to(device) for t in (table, positions, owner, torch.tensor(UNCOND))),
        Settings(*(t.to(device) for t in options)),
        torch.zeros(3, dtype=torch.int64, device=device),
    )


def whole_step(state: State, way: str) -> Tensor:
    """Logits, codes of every request with settings of its own, and the next inputs."""
    B, options = len(state.codes), state.options
    logits = decode_step_by_ops(
        state.weights, state.x, state.pages, state.table, state.positions, way
    )
    codes = guided_sample(
        logits[:B], logits[state.uncond], options.seeds, state.positions[:B],
        guidance_scale=options.guidance, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, implementation=way,
    )  # fmt: skip
    state.codes.copy_(codes)
    state.x.copy_(state.weights.token_embedding[codes[state.owner]])
    state.positions.add_(1)
    return logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stored", BYTES, ids=str)
def test_a_step_reads_nothing_back(way, stored):
    state = make_state(stored, DEVICE)
    with values_unread(), NoReads():  # values are checked on a CPU alone
        logits = whole_step(state, way)
    plain = make_state(stored, DEVICE)
    expected = whole_step(plain, way)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert torch.equal(state.codes, plain.codes)
    for b, row in enumerate(UNCOND):
        options = plain.options.rows(slice(b, b + 1))
        uncond = None if row == b else expected[row : row + 1]
        alone = guided_sample(
            expected[b : b + 1], uncond, options.seeds, plain.positions[b : b + 1] - 1,
            guidance_scale=float(options.guidance), temperature=float(options.temperature),
            top_k=int(options.top_k), top_p=float(options.top_p), implementation=way,
        )  # fmt: skip
        assert alone.item() == state.codes[b]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", BYTES, ids=str)
def test_a_step_needs_no_values_at_all(stored, dtype):
    """Tensors without memory have none to read, and no shape that depends on values."""
    state = make_state(stored, "meta", dtype)
    logits = whole_step(state, "torch")
    assert logits.is_meta and logits.shape == (len(OWNER), SMALL.V)


@pytest.mark.skipif(DEVICE != "cpu", reason="values are checked on a CPU alone")
def test_reads_are_seen():
    state = make_state(None, "cpu")
    with ExitStack() as stack:
        stack.enter_context(NoReads())
        stack.enter_context(pytest.raises(AssertionError, match="reads back: _local_scalar_dense"))
        whole_step(state, "torch")
