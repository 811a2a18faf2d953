"""vq_nearest against its definition in fp64, in every implementation and instruction set."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dar_kernels import native, triton_support, vq_nearest
from dar_kernels.vq_nearest import OP, TILE_M, TILE_V, _vq_nearest, vq_nearest_ref
from dar_kernels.vq_nearest_triton import BLOCK_M, CHUNK, PROGRAMS

MARGIN = 1e-6  # of the squared distance: below it fp32 may choose either of two entries
TRITON = ["triton"] * (triton_support.missing() is None)  # interpreted where there is no GPU
EVERY = ["torch", "default", *TRITON, *(f"isa={isa}" for isa in native.isa_supported())]


def run(way, z, codebook, threads=1):
    """The codes of one implementation, or of the C++ one with a given instruction set."""
    if not way.startswith("isa="):
        return vq_nearest(z, codebook, implementation=None if way == "default" else way)
    from dar_kernels import _native

    codes = torch.full((len(z),), -7)
    _native.vq_nearest(z.float(), codebook.float(), codes, threads, way.removeprefix("isa="))
    return codes


def check(way, z, codebook, **options):
    """Equal codes where no second entry is within MARGIN of the nearest; within it elsewhere."""
    codes = run(way, z, codebook, **options)
    assert codes.dtype == torch.int64
    assert codes.shape == z.shape[:1]
    unit = torch.nn.functional.normalize
    z, codebook = unit(z.double(), dim=-1), unit(codebook.double(), dim=-1)
    distance = (z[:, None] - codebook).square().sum(-1)  # [M, V]
    best = distance.min(-1).values
    chosen = distance.gather(1, codes[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, best, rtol=0, atol=MARGIN)
    decided = (distance <= best[:, None] + MARGIN).sum(-1) == 1
    assert torch.equal(codes[decided], vq_nearest_ref(z, codebook)[decided])
    return decided


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("M", "V", "C"),
    [(1, 1, 8), (1, 4096, 8), (300, 1000, 8), (33, 17, 1), (40, 50, 3), (65, 100, 33), (5, 9, 160)],
    ids=str,
)
def test_equals_the_definition(way, dtype, M, V, C):
    generator = torch.Generator().manual_seed(M + V + C)
    z = torch.randn(M, C, generator=generator).to(dtype)
    codebook = torch.randn(V, C, generator=generator).to(dtype)
    decided = check(way, z, codebook)
    assert decided.float().mean() > 0.9 or C == 1


@pytest.mark.parametrize("way", EVERY)
def test_sizes_that_cross_every_tile(way):
    tile_m, tile_v = (BLOCK_M, CHUNK) if way == "triton" else (TILE_M, TILE_V)
    z, codebook = torch.randn(tile_m + 37, 2), torch.randn(2 * tile_v + 5, 2)
    check(way, z, codebook)
    rows = torch.randperm(len(codebook))
    wide = torch.randn(len(codebook), 8)
    assert torch.equal(run(way, wide[rows] * torch.rand(len(rows), 1).add(0.1), wide), rows)


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 70), V=st.integers(1, 90), C=st.integers(1, 33), seed=st.integers(0, 2**31),
    way=st.sampled_from(EVERY), threads=st.integers(1, 4), grid=st.booleans(),
)  # fmt: skip
def test_any_shape(M, V, C, seed, way, threads, grid):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(M, C, generator=generator)
    codebook = torch.randn(V, C, generator=generator)
    if grid:  # few values: many ties, and rows of zeros
        z, codebook = z.round(), codebook.round()
    options = {"threads": threads} if way.startswith("isa=") else {}
    check(way, z, codebook, **options)


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("V", [3, 16, 50, 1000, 4 * TILE_V])
@pytest.mark.parametrize("C", [1, 8, 13])
def test_equal_entries_give_the_lowest_index(way, V, C):
    if way == "triton":
        V = min(V, 3 * CHUNK)  # the interpreter takes its time
    half = torch.randn(V, C)
    if C == 1:
        half = half.abs()
    rows = half[-64:]
    once = run(way, rows, half)
    twice = run(way, rows, torch.cat([half, half]))
    assert torch.equal(once, twice)
    assert twice.max() < V
    constant = run(way, torch.randn(9, C), torch.ones(V, C))
    assert torch.equal(constant, torch.zeros(9, dtype=torch.int64))


@pytest.mark.parametrize("way", TRITON)
@pytest.mark.parametrize("programs", [1, 5, PROGRAMS])
def test_parts_of_the_codebook_change_nothing(way, programs, monkeypatch):
    monkeypatch.setattr("dar_kernels.vq_nearest_triton.PROGRAMS", programs)
    codebook = torch.randn(700, 8)
    codebook = torch.cat([codebook, codebook])  # the lowest of two parts
    z = torch.randn(20, 8)
    codes = run(way, z, codebook)
    assert codes.max() < 700
    assert torch.equal(codes, run("torch", z, codebook))


@pytest.mark.parametrize("way", [way for way in EVERY if way.startswith("isa=")])
def test_threads_change_nothing(way):
    z, codebook = torch.randn(1000, 8), torch.randn(500, 8)
    alone = run(way, z, codebook)
    for threads in (2, 3, 64):
        assert torch.equal(run(way, z, codebook, threads=threads), alone)


@pytest.mark.skipif("avx512" not in native.isa_supported(), reason="no AVX-512 here")
@pytest.mark.parametrize("C", [8, 13])
def test_fused_multiply_adds_round_alike(C):
    """Even where entries lie closer than fp32 can tell."""
    codebook = torch.randn(64, C).repeat(20, 1)
    codebook += 1e-7 * torch.randn_like(codebook)
    z = torch.randn(512, C)
    assert torch.equal(run("isa=avx512", z, codebook), run("isa=avx2", z, codebook))


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("scale", [1e-11, 1e-3, 1e10, 1e30, 3e37], ids=str)
def test_magnitudes_are_normalised_away(way, scale):
    codebook = torch.randn(200, 8).clamp(-9, 9)
    order = torch.arange(200)
    assert torch.equal(run(way, codebook * scale, codebook), order)
    assert torch.equal(run(way, codebook, codebook * scale), order)


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("scale", [1e-44, 1e-30], ids=str)
def test_norms_far_below_eps_are_as_good_as_zero(way, scale):
    codebook = torch.randn(200, 8)
    assert run(way, codebook * scale, codebook).unique().tolist() == [0]


@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_rows_and_entries_that_are_not_finite(way, poison):
    codebook = torch.randn(40, 8)
    z = codebook.clone()
    z[3, 5] = poison
    poisoned = codebook.clone()
    poisoned[[0, 7], 2] = poison
    codes = run(way, z, codebook)
    assert codes[3] == 0
    assert torch.equal(codes.index_fill(0, torch.tensor(3), 3), torch.arange(40))
    codes = run(way, codebook, poisoned)
    assert not torch.isin(codes, torch.tensor([0, 7])).any()
    kept = [i for i in range(40) if i not in (0, 7)]
    assert codes[kept].tolist() == kept
    hopeless = run(way, codebook, torch.full_like(codebook, poison))
    assert torch.equal(hopeless, torch.zeros(40, dtype=torch.int64))
    for row in (z, poisoned):
        truth = vq_nearest_ref(row.double(), poisoned.double())
        assert torch.equal(run(way, row, poisoned), truth)


@pytest.mark.parametrize("way", EVERY)
def test_rows_of_zeros(way):
    codebook = torch.randn(40, 8)
    z = torch.zeros(3, 8)
    assert run(way, z, codebook).tolist() == [0, 0, 0]
    codebook[21] = 0  # the origin is nearest to itself
    assert run(way, z, codebook).tolist() == [21, 21, 21]
    assert vq_nearest_ref(z.double(), codebook.double()).tolist() == [21, 21, 21]


@pytest.mark.parametrize("way", EVERY)
def test_strides(way):
    z = torch.randn(8, 60, 2)[..., 0].T[::3]  # [20, 8]
    codebook = torch.randn(100, 16)[10:90, ::2]
    assert not z.is_contiguous()
    assert not codebook.is_contiguous()
    assert torch.equal(run(way, z, codebook), run(way, z.contiguous(), codebook.contiguous()))
    expanded = torch.randn(1, 8).expand(20, 8)
    assert run(way, expanded, codebook).unique().numel() == 1
    check(way, z, codebook)


def test_fp64_stays_fp64():
    """Two entries that fp32 cannot tell apart."""
    codebook = torch.tensor([[1.0, 0.0], [1.0, 1e-5]], dtype=torch.float64)
    z = codebook[[1, 0]]
    assert vq_nearest(z, codebook).tolist() == vq_nearest_ref(z, codebook).tolist() == [1, 0]
    assert vq_nearest(z.float(), codebook.float()).tolist() == [0, 0]
    for name in ("native", "triton"):
        with pytest.raises(RuntimeError, match=rf"{name}: (takes torch\.float32|there is no CUDA)"):
            vq_nearest(z, codebook, implementation=name)


def test_autocast_does_not_round():
    codebook = torch.nn.functional.normalize(torch.randn(4096, 8), dim=-1)
    z = torch.randn(64, 8)
    expected = vq_nearest(z, codebook, implementation="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vq_nearest(z, codebook, implementation="torch"), expected)


def test_distances_are_never_whole():
    """The largest tensor made is a tile, whatever M and V."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    M, V = 2 * TILE_M, 4 * TILE_V
    with Largest() as largest:
        OP.choose("cpu", torch.float32, "torch").run(torch.randn(M, 8), torch.randn(V, 8))
    assert largest.numel == TILE_M * TILE_V
    with Largest() as largest:
        OP.choose("cpu", torch.float32, "native").run(torch.randn(M, 8), torch.randn(V, 8))
    assert largest.numel <= max(M, V) * 8


@pytest.mark.parametrize("implementation", ["torch", "native", *TRITON])
def test_registration(implementation):
    z = torch.randn(5, 8, requires_grad=True)
    codebook = torch.randn(20, 8, requires_grad=True)
    torch.library.opcheck(_vq_nearest, (z, codebook, implementation))
    codes = vq_nearest(z, codebook, implementation=implementation)
    assert not codes.requires_grad


def test_compiles_without_a_graph_break():
    z, codebook = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    compiled = torch.compile(
        lambda z, codebook: codebook[vq_nearest(2 * z, codebook)],
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(z, codebook), codebook[vq_nearest(z, codebook)])


@pytest.mark.parametrize(
    ("z", "codebook", "error", "message"),
    [
        ([[1.0]], torch.ones(2, 1), TypeError, "expected z a tensor, got list"),
        (
            torch.ones(2, 8),
            torch.ones(2, 8).int(),
            TypeError,
            r"codebook in one of .*got torch.int",
        ),
        (torch.ones(8), torch.ones(2, 8), ValueError, r"expected z \[M, C >= 1\], got \[8\]"),
        (torch.ones(2, 0), torch.ones(2, 0), ValueError, r"expected z .*, got \[2, 0\]"),
        (torch.ones(2, 8), torch.ones(2, 7), ValueError, r"\[V >= 1, 8\], got \[2, 7\]"),
        (torch.ones(2, 8), torch.ones(0, 8), ValueError, r"\[V >= 1, 8\], got \[0, 8\]"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), ValueError, "float32, got torch.float16"),
        (torch.ones(2, 8), torch.ones(2, 8, device="meta"), ValueError, "on cpu, got meta"),
    ],
    ids=["type", "dtype", "ndim", "C=0", "C", "V=0", "mixed", "device"],
)
def test_wrong_arguments_are_named(z, codebook, error, message):
    with pytest.raises(error, match=message):
        vq_nearest(z, codebook)


def test_wrong_implementation_is_named():
    with pytest.raises(
        ValueError, match="expected implementation one of triton, native, torch, got 'cuda'"
    ):
        vq_nearest(torch.ones(2, 8), torch.ones(2, 8), implementation="cuda")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"isa": "sse9"}, ValueError, "isa: expected one of .*baseline, got sse9"),
        ({"threads": 0}, ValueError, "expected threads >= 1"),
        ({"codes": torch.zeros(3, dtype=torch.int64)}, ValueError, r"expected codes \[M\]"),
        ({"codebook": torch.ones(2, 7)}, ValueError, r"codebook \[V >= 1, C\]"),
        (
            {"codes": torch.zeros(4, dtype=torch.int32)},
            TypeError,
            "incompatible function arguments",
        ),
        ({"z": torch.ones(4, 8).double()}, TypeError, "incompatible function arguments"),
    ],
    ids=["isa", "threads", "codes", "C", "codes-dtype", "z-dtype"],
)
def test_extension_validates(change, error, message):
    from dar_kernels import _native

    arguments = {"z": torch.ones(4, 8), "codebook": torch.ones(2, 8), "threads": 1, "isa": ""}
    arguments["codes"] = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=message):
        _native.vq_nearest(**(arguments | change))
