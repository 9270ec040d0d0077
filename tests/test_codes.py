"""The canonical bit stream: against one big integer per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyquant.codes import pack_codes, row_bytes, unpack_codes
from pyquant.formats import FORMATS

WIDTHS = sorted({f.bits for f in FORMATS.values()})


def big_integer_row(codes: list[int], bits: int) -> list[int]:
    """Code k stands at bit ``k * bits`` of a little-endian number."""
    number = sum(code << (bits * k) for k, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@st.composite
def matrices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.sampled_from(WIDTHS))
    k = draw(st.integers(1, 70))
    rows = st.lists(st.lists(st.integers(0, (1 << bits) - 1), min_size=k, max_size=k), min_size=1, max_size=3)
    return bits, draw(rows)


@given(matrices())
def test_stream_is_little_endian_along_k(matrix: tuple[int, list[list[int]]]) -> None:
    bits, rows = matrix
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.is_contiguous()
    assert packed.tolist() == [big_integer_row(row, bits) for row in rows]
    assert torch.equal(unpack_codes(packed, codes.shape[1], bits), codes)


def test_all_widths() -> None:
    assert WIDTHS == [2, 3, 4, 5, 8]


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_place(bits: int) -> None:
    """Also of a code matrix that is not contiguous."""
    levels = 1 << bits
    codes = ((torch.arange(levels)[:, None] + torch.arange(33)[None, :]) % levels).to(torch.uint8)
    for matrix in (codes, codes.T, codes[::2, ::3]):
        packed = pack_codes(matrix, bits)
        assert packed.tolist() == [big_integer_row(row, bits) for row in matrix.tolist()]
        assert torch.equal(unpack_codes(packed, matrix.shape[1], bits), matrix)


@pytest.mark.parametrize("bits", WIDTHS)
def test_row_bytes_and_tail_bits(bits: int) -> None:
    """A row ends with zero bits: packed files of equal weights are equal."""
    for k in range(1, 40):
        packed = pack_codes(torch.full((1, k), (1 << bits) - 1, dtype=torch.uint8), bits)
        assert packed.shape == (1, row_bytes(k, bits)) == (1, -(-k * bits // 8))
        assert int.from_bytes(bytes(packed[0].tolist()), "little") == (1 << k * bits) - 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_ignores_tail_bits(bits: int) -> None:
    """What other writers leave behind the last code of a row does not reach a code."""
    k = 5
    packed = torch.full((2, row_bytes(k, bits)), 255, dtype=torch.uint8)
    assert torch.equal(unpack_codes(packed, k, bits), torch.full((2, k), (1 << bits) - 1, dtype=torch.uint8))
