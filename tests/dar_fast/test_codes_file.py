"""Packed code files: exact sizes, round trips, and refusal of what does not fit."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dar_fast.codes_file import code_bits, pack, picture_bytes, read_codes, unpack, write_codes


@pytest.mark.parametrize(
    ("tokens", "codebook", "size"),
    [(256, 16_384, 448), (64, 4096, 96), (3, 2, 1), (9, 2, 2), (5, 1000, 7), (1, 16_385, 2)],
)
def test_bytes_of_a_picture(tokens: int, codebook: int, size: int) -> None:
    assert picture_bytes(tokens, codebook) == size
    codes = torch.full((3, tokens), codebook - 1)
    assert len(pack(codes, codebook)) == 3 * size
    assert torch.equal(unpack(pack(codes, codebook), tokens, codebook), codes)


def test_layout_is_highest_bit_first() -> None:
    assert pack(torch.tensor([0b10000000000001, 0b11111111111111]), 16_384) == bytes(
        [0b10000000, 0b00000111, 0b11111111, 0b11110000]
    )


@pytest.mark.parametrize("codebook", [2, 3, 4, 255, 256, 257, 16_384, 2**62])
def test_code_bits(codebook: int) -> None:
    assert 2 ** (code_bits(codebook) - 1) < codebook <= 2 ** code_bits(codebook)


@given(data=st.data(), codebook=st.integers(2, 2**40), tokens=st.integers(1, 40))
def test_round_trip(data: st.DataObject, codebook: int, tokens: int) -> None:
    row = st.lists(st.integers(0, codebook - 1), min_size=tokens, max_size=tokens)
    rows = data.draw(st.lists(row, max_size=4))
    codes = torch.tensor(rows, dtype=torch.int64).reshape(-1, tokens)
    packed = pack(codes, codebook)
    assert len(packed) == len(rows) * picture_bytes(tokens, codebook)
    assert torch.equal(unpack(packed, tokens, codebook), codes)


@given(data=st.binary(max_size=60), codebook=st.integers(2, 5000), tokens=st.integers(1, 20))
def test_any_bytes_are_read_back_or_refused(data: bytes, codebook: int, tokens: int) -> None:
    try:
        codes = unpack(data, tokens, codebook)
    except ValueError as error:
        assert str(error).startswith("data: expected")
    else:
        assert pack(codes, codebook) == data


@pytest.mark.parametrize(
    ("codes", "kind", "message"),
    [
        (torch.tensor([[0, 64]]), ValueError, r"codes: expected codes in \[0, 64\), got 64"),
        (torch.tensor([[-1, 3]]), ValueError, "got -1"),
        (torch.zeros(2, 3), ValueError, "codes: expected int64"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, "codes: expected int64"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "codes: expected int64"),
        ([[1, 2]], TypeError, "codes: expected a tensor, got list"),
    ],
)
def test_wrong_codes(codes: torch.Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        pack(codes, 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(447), "expected a multiple of 448 bytes, 256 codes of 14 bits a picture, got 447"),
        (bytes(449), "got 449"),
    ],
)
def test_wrong_sizes(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(data, 256, 16_384)


def test_wrong_bits_and_ranges() -> None:
    with pytest.raises(ValueError, match="zero bits behind the last code"):
        unpack(b"\xff", 3, 4)
    with pytest.raises(ValueError, match=r"data: expected codes in \[0, 1000\), got 1023"):
        unpack(b"\xff" * 5, 4, 1000)
    with pytest.raises(TypeError, match="data: expected bytes, got str"):
        unpack("x", 4, 1000)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="codebook_size"):
        pack(torch.tensor([0]), 1)


def test_files(tmp_path: Path) -> None:
    codes = torch.randint(0, 16_384, (2, 256), generator=torch.Generator().manual_seed(0))
    path = tmp_path / "two.dar"
    assert write_codes(path, codes, 16_384) == path.stat().st_size == 896
    assert torch.equal(read_codes(path, 256, 16_384), codes)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"two\.dar: data: expected a multiple of 448"):
        read_codes(path, 256, 16_384)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="got an empty file"):
        read_codes(path, 256, 16_384)


def test_a_refused_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "one.dar"
    write_codes(path, torch.tensor([1, 2]), 4)
    with pytest.raises(ValueError, match="codes"):
        write_codes(path, torch.tensor([1, 4]), 4)
    assert read_codes(path, 2, 4).tolist() == [[1, 2]]
    assert [p.name for p in tmp_path.iterdir()] == ["one.dar"]
