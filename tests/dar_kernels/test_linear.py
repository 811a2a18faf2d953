"""linear: the packed product equals the plain one; what cannot be packed says so."""

import pytest
import torch
import torch.nn.functional as F
from truth import EPS, relative_error

from dar_kernels.linear import linear, pack_weight, packs

CAN_PACK = packs(torch.ones(2, 2, dtype=torch.bfloat16))
packing = pytest.mark.skipif(not CAN_PACK, reason="no bf16 products here")


@packing
@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize(("M", "D", "O"), [(1, 8, 5), (37, 96, 130), (1030, 64, 64)], ids=str)
def test_packed_is_no_less_accurate(activation, M, D, O):  # noqa: E741
    x, weight, bias = torch.randn(2, M, D), torch.randn(O, D), torch.randn(O)
    x, weight, bias = (t.bfloat16() for t in (x, weight, bias))
    truth = linear(x.double(), weight.double(), bias.double(), activation)
    plain = linear(x, weight, bias, activation)
    packed = linear(x, pack_weight(weight), bias, activation)
    assert relative_error(packed, truth) <= 2 * relative_error(plain, truth) + EPS
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(linear(strided, pack_weight(weight), bias, activation), packed)


@packing
def test_the_copy_is_a_copy_and_other_dtypes_use_the_weight():
    weight = torch.randn(6, 4, dtype=torch.bfloat16)
    packed = pack_weight(weight)
    x = torch.randn(3, 4)
    assert packed.weight.data_ptr() == weight.data_ptr()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(x, packed), F.linear(x, weight))
    with pytest.raises(ValueError, match="expected no gradients through a packed weight"):
        linear(x.bfloat16().requires_grad_(), packed)


def test_gradients_pass_where_it_is_not_packed():
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: linear(*t, "silu"), (x, weight, bias))


def test_wrong_arguments_are_named():
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="expected activation none or silu, got 'gelu'"):
        linear(x, weight, None, "gelu")
    with pytest.raises(ValueError, match=r"expected x \[..., 4\], got \[2, 5\]"):
        linear(torch.ones(2, 5), weight)
    with pytest.raises(ValueError, match="expected a bf16 matrix on a CPU"):
        pack_weight(weight)
