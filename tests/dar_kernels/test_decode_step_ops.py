"""The decode step as a sequence of ops against its definition in fp64, pages included."""

import pytest
import torch
from decoders import ODD, PLAIN, clone, make_pages, make_weights, reference, widen
from truth import DEVICE, EPS, TRITON, relative_error

from dar_kernels.decode_step_ops import decode_step_by_ops

WAYS = ["torch", *["triton"] * TRITON]


def on(device, weights, *tensors):
    return weights.map(lambda t: t.to(device)), *(t.to(device) for t in tensors)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [ODD, PLAIN], ids=["grouped", "plain"])
def test_no_less_accurate_than_torch(way, dtype, shape):
    weights = make_weights(shape, dtype)
    positions = torch.tensor([0, 70, 31, 32, 5])
    x = torch.randn(5, shape.D, generator=torch.Generator().manual_seed(1)).to(dtype)
    pages, table = make_pages(weights, 5, dtype)
    truth, after = reference(weights, x, pages, table, positions, torch.float64)
    same, _ = reference(
        widen(weights, dtype)._replace(cos=weights.cos, sin=weights.sin), x, pages, table,
        positions, dtype,
    )  # fmt: skip
    tables = weights.cos.float().to(DEVICE), weights.sin.float().to(DEVICE)
    there, x, table, positions = on(DEVICE, weights, x, table, positions)
    own = type(pages)(*(p.to(DEVICE) for p in clone(pages)))
    ours = decode_step_by_ops(
        there._replace(cos=tables[0], sin=tables[1]), x, own, table, positions, way
    )
    assert ours.dtype == torch.float32
    assert relative_error(ours.cpu(), truth) <= 2 * relative_error(same, truth) + EPS
    for mine, expected in zip(own, after, strict=True):
        assert relative_error(mine.cpu(), expected) <= (4e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_an_idle_row_changes_nothing(way):
    weights = make_weights(PLAIN)
    x = torch.randn(3, PLAIN.D, generator=torch.Generator().manual_seed(1))
    pages, table = make_pages(weights, 3, torch.float32)
    there, x, table, busy, idle = on(
        DEVICE, weights, x, table, torch.tensor([4, 40, 9]), torch.tensor([4, -1, 9])
    )
    runs = []
    for positions in (busy, idle):
        own = type(pages)(*(p.to(DEVICE) for p in clone(pages)))
        runs.append((decode_step_by_ops(there, x, own, table, positions, way), own))
    (logits, _), (partly, own) = runs
    torch.testing.assert_close(partly[[0, 2]], logits[[0, 2]])
    untouched = table[1].long()
    assert torch.equal(own.keys.cpu()[:, untouched.cpu()], pages.keys[:, untouched.cpu()])
