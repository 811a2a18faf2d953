"""vq_losses against its definition in fp64, values and gradients, in every implementation."""

import pytest
import torch
import torch.nn.functional as F
from truth import DEVICE, DTYPES, TRITON, check_against_truth

from dar_kernels import UnavailableError
from dar_kernels.vq_losses import vq_losses, vq_losses_ref
from dar_kernels.vq_losses_triton import SEGMENT, TILE, vq_losses_triton

WAYS = ["torch", *["triton"] * TRITON]
BETA = 0.25


def inputs(M, V, C, masked=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, codebook = (3 * torch.randn(n, C, generator=generator) for n in (M, V))
    codes = torch.randint(V, (M,), generator=generator)
    mask = torch.rand(M, generator=generator) < 0.7 if masked else None
    return [t if t is None else t.to(DEVICE) for t in (z, codebook, codes, mask)]


def gradients(way, z, codebook, codes, mask, upstream):
    z, codebook = (t.detach().clone().requires_grad_() for t in (z, codebook))
    out = vq_losses(z, codebook, codes, mask, implementation=way)
    return torch.autograd.grad(out, (z, codebook), upstream)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "V", "C", "masked"),
    [
        (1, 1, 8, False),
        (2 * TILE // 8 + 5, 50, 8, True),
        (3 * SEGMENT // 8 + 7, 2, 8, False),
        (40, 90, 8, True),
        (33, 7, 13, True),
        (20, 5, 2, False),
        (9, 4, 200, True),
    ],
    ids=str,
)
def test_no_less_accurate_than_the_definition(way, dtype, M, V, C, masked):
    *tensors, mask = inputs(M, V, C, masked)
    check_against_truth(
        lambda z, codebook, codes: vq_losses(z, codebook, codes, mask, implementation=way),
        lambda z, codebook, codes: vq_losses_ref(z, codebook, codes, mask, BETA),
        tensors,
        dtype,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scale", [1e-14, 1e-6, 1e6, 1e15], ids=str)
def test_magnitudes(way, scale):
    z, codebook, codes, mask = inputs(50, 20, 8)
    check_against_truth(
        lambda z, codebook: vq_losses(z, codebook, codes, mask, implementation=way),
        lambda z, codebook: vq_losses_ref(z, codebook, codes, mask, BETA),
        (scale * z, codebook / scale),
        torch.float32,
    )


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_zeros_have_finite_gradients(way):
    z, codebook, codes, mask = inputs(40, 5, 8)
    z[3], codebook[codes[7]] = 0, 0
    upstream = [torch.ones(40, 8), torch.ones(40), torch.ones(40)]
    upstream = [t.to(DEVICE) for t in upstream]
    for mine, plain in zip(
        gradients(way, z, codebook, codes, mask, upstream),
        gradients(
            "torch", z.double(), codebook.double(), codes, mask, [u.double() for u in upstream]
        ),
        strict=True,
    ):
        torch.testing.assert_close(
            mine.double(), plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max())
        )


@pytest.mark.parametrize("way", WAYS)
def test_each_loss_reaches_its_own_side_only(way):
    z, codebook, codes, mask = inputs(30, 10, 8)
    none, ones = torch.zeros(30, device=DEVICE), torch.ones(30, device=DEVICE)
    rows = torch.randn(30, 8, device=DEVICE)
    dz, dcodebook = gradients(way, z, codebook, codes, mask, (0 * rows, ones, none))
    assert dz.count_nonzero() == 0
    used = torch.zeros(10, dtype=torch.bool, device=DEVICE)
    used[codes[mask]] = True
    assert torch.equal(dcodebook.count_nonzero(1) > 0, used)
    dz, dcodebook = gradients(way, z, codebook, codes, mask, (0 * rows, none, ones))
    assert torch.equal(dz.count_nonzero(1) > 0, mask)
    assert dcodebook.count_nonzero() == 0
    dz, dcodebook = gradients(way, z, codebook, codes, mask, (rows, none, none))
    leaf = z.clone().requires_grad_()
    straight = torch.autograd.grad(F.normalize(leaf, dim=-1), leaf, rows)[0]
    torch.testing.assert_close(dz, straight)
    assert dcodebook.count_nonzero() == 0


@pytest.mark.parametrize("way", WAYS)
def test_mask_and_weight(way):
    z, codebook, codes, mask = inputs(30, 10, 8)
    masked = vq_losses(z, codebook, codes, mask, commitment=0.5, implementation=way)
    plain = vq_losses(z, codebook, codes, implementation=way)
    assert torch.equal(masked.embedding, plain.embedding)
    assert torch.equal(masked.vq, plain.vq * mask)
    assert torch.equal(masked.commit, 2 * plain.commit * mask)
    e = F.normalize(codebook, dim=-1)[codes]
    torch.testing.assert_close(masked.embedding, e)


@pytest.mark.parametrize("way", WAYS)
def test_strides_mixed_dtypes_and_no_rows(way):
    z, codebook, codes, mask = inputs(40, 30, 16)
    z, codebook, codes, mask = z[::2, ::2], codebook[5:25, 8:], codes[::2] % 20, mask[::2]
    upstream = [
        torch.randn(8, 20, device=DEVICE).T,
        torch.ones(1, device=DEVICE).expand(20),
        torch.randn(40, device=DEVICE)[::2],
    ]
    strided = gradients(way, z, codebook, codes, mask, upstream)
    packed = gradients(way, *(t.contiguous() for t in (z, codebook, codes, mask)), upstream)
    for a, b in zip(strided, packed, strict=True):
        assert torch.equal(a, b)
    low = vq_losses(z.bfloat16(), codebook, codes, mask, implementation=way)
    same = vq_losses(z.bfloat16().float(), codebook, codes, mask, implementation=way)
    for a, b in zip(low, same, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
    upstream = [torch.ones(0, 8, device=DEVICE), *[torch.ones(0, device=DEVICE)] * 2]
    dz, dcodebook = gradients(way, z[:0], codebook, codes[:0], mask[:0], upstream)
    assert dz.shape == (0, 8)
    assert dcodebook.shape == codebook.shape
    assert dcodebook.count_nonzero() == 0


@pytest.mark.skipif(not TRITON, reason="no Triton here")
def test_codebook_gradient_has_the_same_bits_every_time():
    """In any order of equal rows too: only the rows of an entry and their order count."""
    z, codebook, codes, _ = inputs(200, 4, 8)
    upstream = [torch.randn(s, device=DEVICE) for s in ((200, 8), (200,), (200,))]
    once = gradients("triton", z, codebook, codes, None, upstream)[1]
    assert torch.equal(once, gradients("triton", z, codebook, codes, None, upstream)[1])
    order = torch.sort(codes, stable=True).indices
    moved = gradients(
        "triton", z[order], codebook, codes[order], None, [u[order] for u in upstream]
    )
    assert torch.equal(once, moved[1])


@pytest.mark.skipif(not TRITON, reason="no Triton here")
@pytest.mark.parametrize("masked", [False, True])
def test_registration(masked):
    z, codebook, codes, mask = inputs(20, 10, 8, masked)
    torch.library.opcheck(
        vq_losses_triton, (z.requires_grad_(), codebook.requires_grad_(), codes, mask, BETA)
    )


def test_gradcheck_of_the_torch_path():
    z, codebook, codes, mask = (t.cpu() for t in inputs(5, 3, 4))
    z, codebook = z.double().requires_grad_(), codebook.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: vq_losses(z.detach(), c, codes, mask).vq, codebook)
    assert torch.autograd.gradcheck(
        lambda z: vq_losses(z, codebook.detach(), codes, mask).commit, z
    )


@pytest.mark.parametrize("way", WAYS)
def test_compiles_without_a_graph_break(way):
    z, codebook, codes, mask = inputs(20, 10, 8)
    z.requires_grad_()

    def loss(z, codebook, codes, mask):
        out = vq_losses(2 * z, codebook, codes, mask, implementation=way)
        return out.embedding.sum() + out.vq.sum() + out.commit.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = loss(z, codebook, codes, mask), compiled(z, codebook, codes, mask)
    torch.testing.assert_close(traced, eager)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x in (traced, eager)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": [[1.0]]}, TypeError, "expected z a tensor, got list"),
        ({"z": torch.ones(4, 8).int()}, TypeError, r"z in one of .*got torch\.int32"),
        ({"codes": torch.zeros(4).int()}, TypeError, r"codes in torch\.int64, got torch\.int32"),
        ({"mask": torch.ones(4)}, TypeError, r"mask in torch\.bool, got torch\.float32"),
        ({"z": torch.ones(8)}, ValueError, r"expected z \[M, 1 <= C <= 1024\], got \[8\]"),
        ({"z": torch.ones(4, 1025)}, ValueError, r"expected z .*got \[4, 1025\]"),
        ({"codebook": torch.ones(2, 7)}, ValueError, r"codebook \[V >= 1, 8\], got \[2, 7\]"),
        ({"codebook": torch.ones(0, 8)}, ValueError, r"codebook \[V >= 1, 8\], got \[0, 8\]"),
        ({"codes": torch.zeros(3).long()}, ValueError, r"expected codes \[4\], got \[3\]"),
        ({"mask": torch.ones(4, 1).bool()}, ValueError, r"expected mask \[4\], got \[4, 1\]"),
        ({"mask": torch.ones(4, device="meta").bool()}, ValueError, "mask on cpu, got meta"),
        ({"codes": torch.tensor([0, 1, 2, 0])}, ValueError, r"codes in \[0, 2\), got 2"),
        ({"codes": torch.tensor([0, 1, -1, 0])}, ValueError, r"codes in \[0, 2\), got -1"),
        ({"commitment": float("nan")}, ValueError, "commitment >= 0, got nan"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "z": torch.ones(4, 8),
        "codebook": torch.ones(2, 8),
        "codes": torch.zeros(4).long(),
    }
    with pytest.raises(error, match=message):
        vq_losses(**(arguments | change))


def test_fp64_in_triton_is_refused():
    z, codebook, codes, _ = inputs(4, 2, 8)
    with pytest.raises(UnavailableError, match=r"vq_losses on .*triton: (takes|there is no CUDA)"):
        vq_losses(z.double(), codebook, codes, implementation="triton")
    assert vq_losses(z.double(), codebook, codes).vq.dtype == torch.float64
