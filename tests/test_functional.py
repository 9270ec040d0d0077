"""Functions under known names: bitsandbytes' bit planes, torchao's nibbles."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyquant import functional, quantize
from pyquant.formats import FORMATS
from pyquant.functional import (
    create_normal_float_codebook,
    decode_absmax_e4m4,
    dequantize_kbit,
    encode_absmax_e4m4,
    pack_2xint4,
    quantize_kbit,
)

BITS = (2, 3, 4, 5)


def nearest_codes(a: np.ndarray, codebook: np.ndarray, absmax: np.ndarray) -> np.ndarray:
    """Brute force, in blocks of 32; the first of equals."""
    scale = np.where(absmax > 0, absmax, 1)[np.arange(a.size) // 32]
    return np.abs(a[:, None] / scale[:, None] - codebook[None, :]).argmin(axis=1)


def planes_of(codes: np.ndarray, bits: int) -> np.ndarray:
    """Bit i of word ``block * k + j`` is bit j of the code of element ``32 * block + i``."""
    blocks = -(-codes.size // 32)
    words = np.zeros(blocks * bits, np.uint64)
    for element, code in enumerate(codes.tolist()):
        for j in range(bits):
            words[element // 32 * bits + j] |= np.uint64((code >> j & 1) << element % 32)
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("numel", [1, 31, 32, 33, 100, 256])
@pytest.mark.parametrize("absmax_format", ["e4m4", "fp32"])
def test_quantize_kbit(bits: int, numel: int, absmax_format: str) -> None:
    """Known layout: absmax per block of 32, codes in bit planes; padding elements are left out of the comparison."""
    a = torch.randn(numel)
    packed, absmax, codebook = quantize_kbit(a, bits, absmax_format=absmax_format)
    blocks = -(-numel // 32)
    assert (packed.dtype, packed.shape) == (torch.int32, (blocks * bits,))
    assert absmax.shape == (blocks,)
    assert torch.equal(codebook, create_normal_float_codebook(bits))
    expected = np.array([np.abs(a.numpy()[i : i + 32]).max() for i in range(0, numel, 32)])
    if absmax_format == "e4m4":
        assert absmax.dtype == torch.uint8
        assert torch.equal(absmax, encode_absmax_e4m4(torch.from_numpy(expected)))
        expected = decode_absmax_e4m4(absmax).numpy()
    else:
        assert np.array_equal(absmax.numpy(), expected)
    codes = nearest_codes(a.numpy().astype(np.float64), codebook.double().numpy(), expected.astype(np.float64))
    mask = planes_of(np.full(numel, (1 << bits) - 1), bits)
    assert np.array_equal(packed.numpy() & mask, planes_of(codes, bits))
    values = codebook.numpy()[codes] * expected.astype(np.float32)[np.arange(numel) // 32]
    assert np.array_equal(dequantize_kbit(packed, absmax, codebook, bits, numel, torch.float32).numpy(), values)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_of_every_plane(bits: int) -> None:
    """Bit 31 is an int32's sign."""
    codes = np.random.default_rng(0).integers(0, 1 << bits, 32 * 40)
    packed = torch.from_numpy(planes_of(codes, bits))
    assert bool((packed < 0).any())
    codebook = torch.arange(1 << bits).float() + 1
    got = dequantize_kbit(packed, torch.ones(40), codebook, bits, codes.size, torch.float32)
    assert np.array_equal(got.numpy(), codes + 1.0)


@pytest.mark.parametrize("bits", BITS)
def test_user_codebook(bits: int) -> None:
    """Data, not code: bitsandbytes' later codebooks end below 1."""
    table = torch.linspace(-0.66, 0.7, 1 << bits)
    a = torch.randn(5, 7, 11)
    packed, absmax, codebook = quantize_kbit(a, bits, codebook=table, absmax_format="fp32")
    assert torch.equal(codebook, table)
    codes = nearest_codes(a.double().numpy().reshape(-1), table.double().numpy(), absmax.double().numpy())
    got = dequantize_kbit(packed, absmax, codebook, bits, a.numel(), torch.float32).numpy()
    assert np.array_equal(got, table.numpy()[codes] * absmax.numpy()[np.arange(a.numel()) // 32])


@pytest.mark.parametrize("bits", BITS)
def test_padding_words_are_tolerated(bits: int) -> None:
    """bitsandbytes' tensors end with k words and one absmax of padding."""
    a = torch.randn(70)
    packed, absmax, codebook = quantize_kbit(a, bits)
    expected = dequantize_kbit(packed, absmax, codebook, bits, 70)
    longer = torch.cat([packed, torch.full((bits,), -1, dtype=torch.int32)])
    more = torch.cat([absmax, absmax.new_full((1,), 255)])
    assert torch.equal(dequantize_kbit(longer, more, codebook, bits, 70), expected)


@given(st.sampled_from(BITS), st.integers(1, 300), st.sampled_from(["e4m4", "fp32"]), st.integers(0, 1000))
def test_equals_the_format(bits: int, numel: int, absmax_format: str, seed: int) -> None:
    """The bit planes and the format kbit<k> are two stores of one quantization."""
    a = torch.randn(1, numel, generator=torch.Generator().manual_seed(seed))
    planes = dequantize_kbit(*quantize_kbit(a, bits, absmax_format=absmax_format), bits, numel, torch.float32)
    weight = quantize(a, f"kbit{bits}", scale_type=absmax_format)
    assert torch.equal(planes, weight.dequantize().reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    a = torch.randn(40, 33).to(dtype)
    first, second = quantize_kbit(a.T), quantize_kbit(a.T.contiguous().float())
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    exact = dequantize_kbit(*first, 4, a.numel(), torch.float32)
    assert torch.equal(dequantize_kbit(*first, 4, a.numel(), dtype), exact.to(dtype))
    assert dequantize_kbit(*first, 4, a.numel()).dtype == torch.float16


def test_blocks_of_zeros() -> None:
    a = torch.cat([torch.zeros(32), torch.randn(32)])
    got = dequantize_kbit(*quantize_kbit(a, 3), 3, 64, torch.float32)
    assert torch.equal(got[:32], torch.zeros(32))


def test_normal_float_codebook() -> None:
    for bits in BITS:
        codebook = create_normal_float_codebook(bits, device="cpu")
        assert codebook.dtype == torch.float32
        assert codebook.tolist() == list(FORMATS[f"kbit{bits}"].codebook or ())
        assert bool((codebook.diff() > 0).all())
        assert codebook.max() == 1
    create_normal_float_codebook(4).zero_()
    assert create_normal_float_codebook(4).max() == 1  # each call has its own


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_pack_2xint4(dtype: torch.dtype) -> None:
    """Row 2i in the low nibble, row 2i + 1 in the high one; all pairs of codes."""
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    if dtype == torch.int8:
        low, high = low - 8, high - 8
    t = torch.stack([low.reshape(-1), high.reshape(-1)], dim=1).view(-1, 2).T.to(dtype)
    assert t.shape == (2, 256)
    packed = pack_2xint4(t)
    assert packed.dtype == dtype
    assert packed.shape == (1, 256)
    expected = (low.reshape(-1) & 15) | (high.reshape(-1) & 15) << 4
    assert torch.equal(packed[0].view(torch.uint8).long(), expected)
    tall = torch.randint(0, 8, (6, 5)).to(dtype)
    assert torch.equal(pack_2xint4(tall), tall[[0, 2, 4]] | tall[[1, 3, 5]] << 4)


def test_names() -> None:
    assert functional.__all__
    assert all(callable(getattr(functional, name)) for name in functional.__all__)


def test_errors_name_function_and_argument() -> None:
    a = torch.randn(64)
    packed, absmax, codebook = quantize_kbit(a, 3)
    cases = [
        (lambda: quantize_kbit(a, 6), r"quantize_kbit: k: expected 2, 3, 4 or 5, got 6"),
        (lambda: quantize_kbit(a, 1), r"quantize_kbit: k: expected 2, 3, 4 or 5, got 1"),
        (lambda: quantize_kbit(a[:0]), r"quantize_kbit: A: expected at least one element"),
        (lambda: quantize_kbit(a, absmax_format="fp8"), r"quantize_kbit: absmax_format: .*got 'fp8'"),
        (lambda: quantize_kbit(a, 3, codebook=torch.ones(4)), r"codebook: expected \[8\]"),
        (lambda: quantize_kbit(torch.full((4,), torch.nan)), r"expected finite values"),
        (lambda: dequantize_kbit(packed, absmax, codebook, 9, 64), r"dequantize_kbit: k: expected 2, 3, 4 or 5, got 9"),
        (lambda: dequantize_kbit(packed, absmax, codebook, 3, 0), r"dequantize_kbit: n=0"),
        (lambda: dequantize_kbit(packed, absmax, codebook, 3, 65), r"dequantize_kbit: n=65, k=3: .*\[9\].*got \[6\]"),
        (lambda: dequantize_kbit(packed, absmax[:1], codebook, 3, 64), r"dequantize_kbit: n=64.*and \[1\]"),
        (lambda: dequantize_kbit(packed, absmax, codebook[:4], 3, 64), r"dequantize_kbit: codebook: expected \[8\]"),
        (lambda: create_normal_float_codebook(7), r"create_normal_float_codebook: k: expected 2, 3, 4 or 5, got 7"),
        (lambda: pack_2xint4(torch.zeros(3, 2, dtype=torch.int8)), r"pack_2xint4: t: .*even R.*\[3, 2\]"),
        (lambda: pack_2xint4(torch.zeros(4, dtype=torch.int8)), r"pack_2xint4: t: "),
        (lambda: pack_2xint4(torch.zeros(2, 2)), r"pack_2xint4: t: expected int8 or uint8.*float32"),
    ]
    wrong = []
    for call, message in cases:
        with pytest.raises(ValueError) as raised:  # noqa: PT011
            call()
        if not re.search(message, str(raised.value)):
            wrong.append((message, str(raised.value)))
    assert wrong == []


def test_wrong_dtypes_name_function_and_argument() -> None:
    packed, absmax, codebook = quantize_kbit(torch.randn(64), 3)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        quantize_kbit(torch.arange(64))
    expected = r"dequantize_kbit: expected int32 packed and uint8 or float32 absmax, got "
    for dtype in (torch.float32, torch.int64, torch.uint8):
        with pytest.raises(TypeError, match=expected + rf"{dtype} and torch\.uint8"):
            dequantize_kbit(packed.to(dtype), absmax, codebook, 3, 64)
    for dtype in (torch.int64, torch.float16, torch.int8):
        with pytest.raises(TypeError, match=expected + rf"torch\.int32 and {dtype}"):
            dequantize_kbit(packed, absmax.to(dtype), codebook, 3, 64)
