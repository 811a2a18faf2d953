"""Packed code files: ceil(log2 V) bits a code, the highest bit first, and nothing else.

A picture takes ceil(N ceil(log2 V) / 8) bytes: 448 for 256 codes of 16,384. The pictures of a file
lie behind one another, so its size gives their number; V and N are those of the tokenizer.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dar_fast.files import atomic_write


def code_bits(codebook_size: int) -> int:
    """Bits of one code: ceil(log2 V)."""
    if isinstance(codebook_size, bool) or not isinstance(codebook_size, int):
        raise TypeError(f"codebook_size: expected an integer, got {codebook_size!r}")
    if not 2 <= codebook_size <= 2**62:
        raise ValueError(f"codebook_size: expected an integer in [2, 2^62], got {codebook_size}")
    return (codebook_size - 1).bit_length()


def picture_bytes(num_tokens: int, codebook_size: int) -> int:
    """Bytes of one picture."""
    if isinstance(num_tokens, bool) or not isinstance(num_tokens, int):
        raise TypeError(f"num_tokens: expected an integer, got {num_tokens!r}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected an integer >= 1, got {num_tokens}")
    return -(-num_tokens * code_bits(codebook_size) // 8)


def _check_range(name: str, codes: Tensor, codebook_size: int) -> None:
    if not codes.numel():
        return
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"{name}: expected codes in [0, {codebook_size}), got {low if low < 0 else high}"
        )


def pack(codes: Tensor, codebook_size: int) -> bytes:
    """Bytes of codes `[B, N]` or `[N]` int64, each in [0, V).

    Raises:
        TypeError, ValueError: where the codes have another dtype, shape or range.
    """
    bits = code_bits(codebook_size)
    if not isinstance(codes, Tensor):
        raise TypeError(f"codes: expected a tensor, got {type(codes).__name__}")
    if codes.dtype != torch.int64 or codes.ndim not in (1, 2) or not codes.shape[-1]:
        raise ValueError(f"codes: expected int64 [B, N], got {codes.dtype} {list(codes.shape)}")
    _check_range("codes", codes, codebook_size)
    N = codes.shape[-1]
    values = codes.detach().cpu().reshape(codes.numel() // N, N).numpy()
    shifts = np.arange(bits - 1, -1, -1)
    spread = ((values[..., None] >> shifts) & 1).astype(np.uint8)  # [B, N, bits]
    return np.packbits(spread.reshape(len(values), N * bits), axis=1).tobytes()


def unpack(data: bytes, num_tokens: int, codebook_size: int) -> Tensor:
    """Codes `[B, N]` int64 of packed bytes; B follows from their number.

    Raises:
        TypeError: where `data` is not bytes.
        ValueError: where the bytes are not those of whole pictures of this N and V.
    """
    size, bits = picture_bytes(num_tokens, codebook_size), code_bits(codebook_size)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"data: expected bytes, got {type(data).__name__}")
    if len(data) % size:
        raise ValueError(
            f"data: expected a multiple of {size} bytes, "
            f"{num_tokens} codes of {bits} bits a picture, got {len(data)}"
        )
    rows = np.frombuffer(data, dtype=np.uint8).reshape(len(data) // size, size)
    spread = np.unpackbits(rows, axis=1)  # [B, 8 size]
    if spread[:, num_tokens * bits :].any():
        raise ValueError("data: expected zero bits behind the last code of a picture, got others")
    powers = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    values = (
        spread[:, : num_tokens * bits].reshape(len(rows), num_tokens, bits).astype(np.int64)
        @ powers
    )
    codes = torch.from_numpy(values)
    _check_range("data", codes, codebook_size)
    return codes


def write_codes(path: str | os.PathLike[str], codes: Tensor, codebook_size: int) -> int:
    """Write codes `[B, N]` to a file, whole or not at all; the number of bytes.

    Raises:
        TypeError, ValueError: where the codes do not fit.
        OSError: where the file cannot be written.
    """
    data = pack(codes, codebook_size)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def read_codes(path: str | os.PathLike[str], num_tokens: int, codebook_size: int) -> Tensor:
    """Codes `[B, N]`, B ≥ 1, of a file.

    Raises:
        OSError: where the file cannot be read.
        ValueError: where it is empty, or was not written with this N and V.
    """
    data = Path(path).read_bytes()
    if not data:
        size = picture_bytes(num_tokens, codebook_size)
        raise ValueError(f"{path}: expected a multiple of {size} bytes, got an empty file")
    try:
        return unpack(data, num_tokens, codebook_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


__all__ = ["code_bits", "pack", "picture_bytes", "read_codes", "unpack", "write_codes"]
