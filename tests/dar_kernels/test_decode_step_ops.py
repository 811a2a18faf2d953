"""The decode step as a sequence of ops against its definition in fp64, pages included."""

import pytest
import torch
from decoders import (
    ODD,
    PLAIN,
    Shape,
    clone,
    dequantized,
    make_pages,
    make_weights,
    reference,
    widen,
)
from truth import DEVICE, EPS, TRITON, relative_error

from dar_kernels.decode_step import decode_step_ref
from dar_kernels.decode_step_ops import decode_step_by_ops
from dar_kernels.pages import LARGEST_CODE

WAYS = ["torch", *["triton"] * TRITON]
BYTES = [torch.int8, torch.float8_e4m3fn]
SMALL = Shape(D=48, heads=4, kv_heads=2, F=40, V=33)
POSITIONS = (0, 70, 31, 32, 5)


def on(device, weights, *tensors):
    return weights.map(lambda t: t.to(device)), *(t.to(device) for t in tensors)


def inputs(shape, dtype, rows=5):
    return torch.randn(rows, shape.D, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(weights, x, pages, table, positions, way):
    """Logits, and pages after the step, on the CPU."""
    there, x, table, positions = on(DEVICE, weights, x, table, positions)
    own = clone(pages, device=DEVICE)
    logits = decode_step_by_ops(there, x, own, table, positions, way)
    assert logits.dtype == torch.float32
    return logits.cpu(), clone(own, device="cpu")


def rounded(weights, dtype):
    """All but the tables in `dtype`."""
    return widen(weights, dtype)._replace(cos=weights.cos, sin=weights.sin)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "stored"), [(ODD, None), (PLAIN, None), *((SMALL, dtype) for dtype in BYTES)],
    ids=["grouped", "plain", "int8", "fp8"],
)  # fmt: skip
def test_no_less_accurate_than_torch(way, dtype, shape, stored):
    """Weights as they are or in one byte, against what they stand for."""
    weights = make_weights(shape, dtype)
    weights = weights if stored is None else weights.quantize(stored)
    x, positions = inputs(shape, dtype), torch.tensor(POSITIONS)
    pages, table = make_pages(weights, 5, dtype)
    exact = dequantized(weights)
    truth, after = reference(exact, x, pages, table, positions, torch.float64)
    plain = rounded(exact, dtype)
    same, _ = reference(plain, x, pages, table, positions, dtype)
    logits, own = step(weights, x, pages, table, positions, way)
    assert relative_error(logits, truth) <= 2 * relative_error(same, truth) + EPS
    for mine, expected in zip(own[:2], after[:2], strict=True):
        assert relative_error(mine, expected) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("stored", BYTES, ids=str)
def test_the_definition_reads_quantised_weights(stored):
    weights = make_weights(ODD).quantize(stored)
    x, positions = inputs(ODD, torch.float64), torch.tensor(POSITIONS)
    pages, table = make_pages(weights, 5, torch.float64)
    truth, _ = reference(dequantized(weights), x, pages, table, positions, torch.float64)
    ours = decode_step_ref(weights, x, clone(pages), table, positions)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)  # norms are in fp32 there


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("page", BYTES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_pages(way, page, dtype):
    """New keys and values are off by half a step of their codes, and logits by no more than that.

    The truth reads what the old codes stand for and keeps the new tokens as they are. A code of
    int8 is off by 1/2; one of e4m3 by 1/16 of itself, or 2^-10 below its least normal number.
    """
    weights = make_weights(SMALL, dtype)
    x, positions = inputs(SMALL, dtype), torch.tensor(POSITIONS)
    pages, table = make_pages(weights, 5, page)
    truth, after = reference(widen(weights), x, pages, table, positions, torch.float64)
    logits, own = step(weights, x, pages, table, positions, way)
    unit = 2**-8 if dtype == torch.bfloat16 else 1e-6  # of qkv before it is quantised
    coarse = []
    read = clone(own, torch.float64)
    at = table.gather(1, (positions // 32)[:, None]).squeeze(1).long()
    for mine, expected, scales in zip(read[:2], after[:2], own[2:], strict=True):
        new, exact = (part[:, at, :, positions % 32] for part in (mine, expected))
        step_of = scales[:, at, :, positions % 32, None].double()  # [rows, layers, Hkv, 1]
        half = step_of / 2 if page == torch.int8 else (exact.abs() / 16).maximum(step_of * 2**-10)
        room = half + 4 * unit * exact.abs().amax(-1, keepdim=True).expand_as(exact)
        assert ((new - exact).abs() <= room)[:, 0].all()  # no layer before adds to it
        coarse.append(float(room.norm() / exact.norm()))
        assert relative_error(new, exact) <= coarse[-1]
        rest = torch.ones(mine.shape[:4], dtype=torch.bool)
        rest[:, at, :, positions % 32] = False
        assert torch.equal(mine[rest], expected[rest])
    assert relative_error(logits, truth) <= max(coarse)
    assert own.keys.dtype == page and page in LARGEST_CODE


@pytest.mark.parametrize("way", WAYS)
def test_an_idle_row_changes_nothing(way):
    weights = make_weights(PLAIN)
    x = inputs(PLAIN, torch.float32, 3)
    pages, table = make_pages(weights, 3, torch.float32)
    busy, _ = step(weights, x, pages, table, torch.tensor([4, 40, 9]), way)
    idle, own = step(weights, x, pages, table, torch.tensor([4, -1, 9]), way)
    torch.testing.assert_close(idle[[0, 2]], busy[[0, 2]])
    untouched = table[1].long()
    assert torch.equal(own.keys[:, untouched], pages.keys[:, untouched])


def test_the_definition_refuses_pages_with_scales():
    weights = make_weights(PLAIN)
    pages, table = make_pages(weights, 1, torch.int8)
    with pytest.raises(TypeError, match=r"pages without scales, got torch.int8"):
        decode_step_ref(weights, inputs(PLAIN, torch.float32, 1), pages, table, torch.tensor([0]))
