"""vq_nearest on CUDA: code = argmax_v ẑ·ê − ‖ê‖²/2, the distances on chip, in plain fp32.

Three launches. `_vq_pack_kernel` normalises both inputs once, in fp64, into panels of 32 rows with
the channels outside: [·, C + 1, 32]. `_vq_partial_kernel` keeps 16 rows a warp in registers while
entries pass, one a lane, so that every load is a coalesced 128 bytes at a constant offset and
serves 16 multiply-adds a lane; no shared memory. It remembers in which chunk of 128 entries the
best was, not which entry: 10.5 instructions a pair at C = 8, of which 8 multiply-adds (SASS).
`_vq_finish_kernel` reduces over the parts of the codebook (many where M is small) and looks the
winner up in its chunk, by the same operations in the same order.
An fp32 `tl.dot` would be the same multiply-adds with operands through shared memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dar_kernels.aot import DenoiserShape, Shape, Variant
from dar_kernels.triton_support import launch_options, tl, triton

PANEL = tl.constexpr(32)  # rows of a panel: the lanes of a warp
TILES = 4  # panels of a chunk
CHUNK = 128  # entries of a chunk
BLOCK_M = 64  # rows a program: 16 a warp, whose C = 8 channels take 128 registers
HOISTED = 8  # largest C whose rows stay in registers; wider ones are read again from L1
PROGRAMS = 1056  # 8 a multiprocessor of 132; smaller M splits the codebook to have as many
PACK = 128
FINISH = 8  # rows a program
OPTIONS = launch_options(num_warps=4, num_stages=1)  # chosen from AOT registers; not timed


@triton.jit
def _pack(x_ptr, out_ptr, first, N, stride_n, stride_c, C, PACK: tl.constexpr):
    rows = (first + tl.arange(0, PACK)).to(tl.int64)
    inside = rows < N
    square = tl.zeros([PACK], tl.float64)
    for c in range(C):
        x = tl.load(x_ptr + rows * stride_n + c * stride_c, mask=inside, other=0.0).to(tl.float64)
        square += x * x
    norm = tl.sqrt(square)
    good = inside & (norm < float("inf"))  # False for NaN
    scale = tl.where(good, tl.maximum(norm, 1e-12), 1.0)
    out_ptr += rows // PANEL * (C + 1) * PANEL + rows % PANEL
    for c in range(C):
        x = tl.load(x_ptr + rows * stride_n + c * stride_c, mask=inside, other=0.0).to(tl.float64)
        tl.store(out_ptr + c * PANEL, tl.where(good, x / scale, 0.0).to(tl.float32))
    length = norm / scale
    bias = tl.where(good, -0.5 * length * length, -float("inf")).to(tl.float32)
    tl.store(out_ptr + C * PANEL, bias)


@triton.jit
def _vq_pack_kernel(
    z_ptr, codebook_ptr, rows_ptr, entries_ptr, M, V, row_programs,
    stride_zm, stride_zc, stride_ev, stride_ec, C, PACK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if pid < row_programs:
        _pack(z_ptr, rows_ptr, pid * PACK, M, stride_zm, stride_zc, C, PACK)
    else:
        first = (pid - row_programs) * PACK
        _pack(codebook_ptr, entries_ptr, first, V, stride_ev, stride_ec, C, PACK)


@triton.jit
def _vq_partial_kernel(
    rows_ptr, entries_ptr, best_ptr, chunk_ptr, M_padded, chunks, chunks_a_part,
    C: tl.constexpr, HOIST: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rows_ptr += rows // PANEL * (C + 1) * PANEL + rows % PANEL
    z = tl.tuple([])
    if HOIST:
        for c in tl.static_range(C):
            z += (tl.load(rows_ptr + c * PANEL)[:, None],)
    first = tl.program_id(1) * chunks_a_part
    lanes = tl.arange(0, PANEL)
    entry_ptr = entries_ptr + first.to(tl.int64) * (TILES * (C + 1) * PANEL) + lanes
    best = tl.full([BLOCK_M, PANEL], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK_M, PANEL], tl.int32) + first
    for chunk in range(first, tl.minimum(first + chunks_a_part, chunks)):
        top = tl.full([BLOCK_M, PANEL], -float("inf"), tl.float32)
        for _ in tl.static_range(TILES):
            bias = tl.load(entry_ptr + C * PANEL)[None, :]
            score = tl.broadcast_to(bias, [BLOCK_M, PANEL])
            if HOIST:
                for c in tl.static_range(C):
                    score = tl.fma(z[c], tl.load(entry_ptr + c * PANEL)[None, :], score)
            else:
                for c in range(C):
                    row = tl.load(rows_ptr + c * PANEL)[:, None]
                    score = tl.fma(row, tl.load(entry_ptr + c * PANEL)[None, :], score)
            top = tl.maximum(top, score)
            entry_ptr += (C + 1) * PANEL
        better = top > best
        best = tl.where(better, top, best)
        where = tl.where(better, chunk, where)
    row_best = tl.max(best, 1)
    row_chunk = tl.min(tl.where(best == row_best[:, None], where, 2147483647), 1)
    out = tl.program_id(1).to(tl.int64) * M_padded + rows
    tl.store(best_ptr + out, row_best)
    tl.store(chunk_ptr + out, row_chunk)


@triton.jit
def _vq_finish_kernel(
    rows_ptr, entries_ptr, best_ptr, chunk_ptr, codes_ptr, M, M_padded, parts, C,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    best = tl.load(best_ptr + rows)
    chunk = tl.load(chunk_ptr + rows)
    for part in range(1, parts):
        offset = part * M_padded.to(tl.int64) + rows
        other = tl.load(best_ptr + offset)
        better = other > best  # equal ones: the earlier part has the lower chunks
        best = tl.where(better, other, best)
        chunk = tl.where(better, tl.load(chunk_ptr + offset), chunk)
    rows_ptr += rows // PANEL * (C + 1) * PANEL + rows % PANEL
    index = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    entry_ptr = entries_ptr + (index // PANEL).to(tl.int64) * (C + 1) * PANEL + index % PANEL
    score = tl.load(entry_ptr + C * PANEL)
    for c in range(C):
        row = tl.load(rows_ptr + c * PANEL)[:, None]
        score = tl.fma(tl.broadcast_to(row, score.shape), tl.load(entry_ptr + c * PANEL), score)
    top = tl.max(score, 1)
    code = tl.min(tl.where(score == top[:, None], index, 2147483647), 1)
    bad = tl.load(rows_ptr + C * PANEL) == -float("inf")
    tl.store(codes_ptr + rows, tl.where(bad, 0, code).to(tl.int64), mask=rows < M)


def launch(z: Tensor, codebook: Tensor) -> Tensor:
    """Codes int64 [M]; workspace 4·(C + 1)·(M + V) bytes and 8·M a part of the codebook."""
    (M, C), V = z.shape, len(codebook)
    codes = torch.empty(M, dtype=torch.int64, device=z.device)
    if M == 0:
        return codes
    M_padded, V_padded = triton.cdiv(M, PACK) * PACK, triton.cdiv(V, PACK) * PACK
    packed = torch.empty((M_padded + V_padded) * (C + 1), device=z.device)
    rows, entries = packed[: M_padded * (C + 1)], packed[M_padded * (C + 1) :]
    _vq_pack_kernel[((M_padded + V_padded) // PACK,)](
        z, codebook, rows, entries, M, V, M_padded // PACK,
        z.stride(0), z.stride(1), codebook.stride(0), codebook.stride(1), C, PACK=PACK,
        **OPTIONS,
    )  # fmt: skip
    blocks, chunks = M_padded // BLOCK_M, V_padded // CHUNK
    chunks_a_part = triton.cdiv(chunks, triton.cdiv(PROGRAMS, blocks))
    parts = triton.cdiv(chunks, chunks_a_part)
    best = torch.empty((parts, M_padded), device=z.device)
    chunk = torch.empty((parts, M_padded), dtype=torch.int32, device=z.device)
    _vq_partial_kernel[(blocks, parts)](
        rows, entries, best, chunk, M_padded, chunks, chunks_a_part,
        C=C, HOIST=C <= HOISTED, BLOCK_M=BLOCK_M, TILES=TILES, **OPTIONS,
    )  # fmt: skip
    _vq_finish_kernel[(triton.cdiv(M, FINISH),)](
        rows, entries, best, chunk, codes, M, M_padded, parts, C,
        BLOCK_M=FINISH, CHUNK=CHUNK, **OPTIONS,
    )  # fmt: skip
    return codes


def variants(shape: Shape) -> Iterator[Variant]:
    """The three kernels for the codebook of a tokenizer; fp32 rows, and bf16 under autocast."""
    if not isinstance(shape, DenoiserShape):
        return
    panels = {"rows_ptr": "*fp32", "entries_ptr": "*fp32"}
    partial = {"best_ptr": "*fp32", "chunk_ptr": "*i32", "M_padded": "i32"}
    for dtype in ("fp32", "bf16"):
        sizes = ("M", "V", "row_programs", "stride_zm", "stride_ev", "C")
        yield Variant(
            kernel=_vq_pack_kernel,
            signature={"z_ptr": f"*{dtype}", "codebook_ptr": f"*{dtype}"}
            | panels
            | dict.fromkeys(sizes, "i32"),
            constants={"PACK": PACK, "stride_zc": 1, "stride_ec": 1},
            aligned=("M", "V"),
            options=OPTIONS,
        )
    C = shape.code_dim
    yield Variant(
        kernel=_vq_partial_kernel,
        signature=panels | partial | {"chunks": "i32", "chunks_a_part": "i32"},
        constants={"C": C, "HOIST": C <= HOISTED, "BLOCK_M": BLOCK_M, "TILES": TILES},
        aligned=("M_padded", "chunks"),
        options=OPTIONS,
    )
    yield Variant(
        kernel=_vq_finish_kernel,
        signature=panels
        | partial
        | {"codes_ptr": "*i64"}
        | dict.fromkeys(("M", "parts", "C"), "i32"),
        constants={"BLOCK_M": FINISH, "CHUNK": CHUNK},
        aligned=("M", "M_padded"),
        options=OPTIONS,
    )
