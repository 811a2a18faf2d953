"""Dropout: rates, one mask for both passes, torch's generator, every instruction set alike."""

import pytest
import torch

from dar_kernels import UnavailableError, dropout, native
from dar_kernels.dropout import _dropout

WAYS = ["torch", *(["native"] if native.missing() is None else [])]
SIZE = 1 << 18


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.97])
def test_the_share_and_the_scale(way, dtype, p) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(SIZE, dtype=dtype), p, implementation=way)
    kept = y != 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * (p * (1 - p) / SIZE) ** 0.5
    torch.testing.assert_close(y[kept].float().unique().item(), 1 / (1 - p), rtol=4e-3, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_has_the_mask_of_the_output(way) -> None:
    x = torch.randn(3, 5, 70_001, requires_grad=True)
    y = dropout(x, 0.3, implementation=way)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.where(y == 0, 0.0, 1 / 0.7))
    torch.testing.assert_close(y, x * dx)


@pytest.mark.parametrize("way", WAYS)
def test_the_generator_decides(way) -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first, second = (dropout(x, 0.5, implementation=way) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5, implementation=way), first)


@pytest.mark.skipif("native" not in WAYS, reason=str(native.missing()))
class TestNative:
    @pytest.mark.parametrize("lag", [1, 2, 16, 64, 768, 1 << 16])
    def test_elements_are_independent(self, lag) -> None:
        torch.manual_seed(1)
        gone = (dropout(torch.ones(SIZE), 0.5) == 0).double() - 0.5
        correlation = float((gone[lag:] * gone[:-lag]).mean()) / 0.25
        assert abs(correlation) < 5 / (SIZE - lag) ** 0.5

    def test_keys_are_independent(self) -> None:
        x = torch.ones(SIZE)
        a, b = ((_dropout(x, torch.tensor(key), 0.5) == 0).double() - 0.5 for key in (7, 8))
        assert abs(float((a * b).mean()) / 0.25) < 5 / SIZE**0.5

    @pytest.mark.parametrize("isa", native.isa_supported())
    @pytest.mark.parametrize("threads", [1, 3])
    def test_instruction_sets_and_threads_agree(self, isa, threads) -> None:
        from dar_kernels import _native

        x = torch.randn(200_003)
        out, other = torch.empty_like(x), torch.empty_like(x)
        _native.dropout(x, out, 99, 0.25, 1)
        _native.dropout(x, other, 99, 0.25, threads, isa)
        assert torch.equal(out, other)

    def test_strides_and_no_elements(self) -> None:
        x = torch.randn(40, 30).t()
        y = dropout(x, 0.5)
        assert torch.equal(y[y != 0], 2 * x[y != 0])
        assert dropout(torch.empty(0, 3), 0.5).shape == (0, 3)

    def test_registration(self) -> None:
        torch.library.opcheck(
            _dropout, (torch.randn(7, 3).t().requires_grad_(), torch.tensor(3), 0.1)
        )

    def test_compiles(self) -> None:
        x = torch.randn(64, 8, requires_grad=True)
        compiled = torch.compile(lambda x: dropout(2 * x, 0.5), fullgraph=True, backend="aot_eager")
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(y, x * dx)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"dropout: expected p in \[0, 1\), got 1.0"):
        dropout(torch.ones(3), 1.0)
    with pytest.raises(TypeError, match="dropout: expected x"):
        dropout(torch.ones(3, dtype=torch.int64), 0.1)
    if "native" in WAYS:
        with pytest.raises(UnavailableError, match="native"):
            dropout(torch.ones(3, dtype=torch.float64), 0.1, implementation="native")
    x = torch.ones(3)
    assert dropout(x, 0.0) is x
