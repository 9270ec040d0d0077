"""The packed layout: against a packer written from the words of kernels/layout.hpp, and back again."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    VARIANTS,
    CxWeightSizes,
    Variant,
    c_library,
    c_weight,
    each_variant,
    exact_codes,
    random_weight,
    raw,
    same_weight,
    scale_parts,
)
from hypothesis import given
from hypothesis import strategies as st

from pyquant import PackedWeight, QuantizedWeight
from pyquant.formats import Encoding

# v -> (row, k) of a lane l = 4g + t in a k16 step: the registers a0..a3 of mma.sync.m16n8k16, two codes each.
LANE_CODES = [
    (lambda g, t: (g, 2 * t)),
    (lambda g, t: (g, 2 * t + 1)),
    (lambda g, t: (g + 8, 2 * t)),
    (lambda g, t: (g + 8, 2 * t + 1)),
    (lambda g, t: (g, 2 * t + 8)),
    (lambda g, t: (g, 2 * t + 9)),
    (lambda g, t: (g + 8, 2 * t + 8)),
    (lambda g, t: (g + 8, 2 * t + 9)),
]
# The 32 codes of each lane, as (row, k) in an atom of 16 x 64: 4 steps of 8.
LANES = [
    [(row, 16 * step + k) for step in range(4) for row, k in (at(lane // 4, lane % 4) for at in LANE_CODES)]
    for lane in range(32)
]
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 8: (8,)}  # of power-of-two width, low bits first


def lane_bytes(codes: list[int], width: int, halves: bool) -> bytes:
    """A lane's 32 codes of ``width`` bits in words of 32 bits.

    Pairs: consecutive codes in consecutive bits. Halves: the pairs' first codes in the low half-word, their second
    codes in the high one.
    """
    out = b""
    per_word = 32 // width
    for start in range(0, 32, per_word):
        word = 0
        for i, code in enumerate(codes[start : start + per_word]):
            word |= code << (width * (i // 2) + 16 * (i % 2) if halves else width * i)
        out += word.to_bytes(4, "little")
    return out


def pack_atom(codes: np.ndarray, bits: int, halves: bool) -> bytes:
    """[16, 64] codes: planes one behind the other, each in pieces of at most 16 bytes per lane, lanes side by side."""
    out, low = b"", 0
    for width in PLANES[bits]:
        lanes = [
            lane_bytes([int(codes[at]) >> low & ((1 << width) - 1) for at in places], width, halves) for places in LANES
        ]
        piece = min(16, 4 * width)
        for start in range(0, 4 * width, piece):
            out += b"".join(lane[start : start + piece] for lane in lanes)
        low += width
    return out


def pack_codes(weight: QuantizedWeight) -> bytes:
    """Slabs of 64 rows; their blocks of 64 x 64 along K; four atoms a block; padded with code 0."""
    fmt = weight.format
    codes = np.zeros((-(-weight.n // 64) * 64, -(-weight.k // 64) * 64), np.int64)
    codes[: weight.n, : weight.k] = exact_codes(weight)
    if fmt.encoding is Encoding.SIGNED:
        codes ^= fmt.levels // 2  # packed codes are unsigned
    halves = fmt.encoding is not Encoding.CODEBOOK
    return b"".join(
        pack_atom(codes[row : row + 16, k : k + 64], fmt.bits, halves)
        for slab in range(0, codes.shape[0], 64)
        for k in range(0, codes.shape[1], 64)
        for row in range(slab, slab + 64, 16)
    )


def pack_groups(values: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """[N, groups] -> [slab][group][64]: rows g, g + 8, .., g + 56 side by side; groups cover the padded K."""
    if weight.flat_scales:
        return values
    groups = 1 if weight.group_size >= weight.k else -(-(-(-weight.k // 64) * 64) // weight.group_size)
    slabs = -(-weight.n // 64)
    padded = np.zeros((slabs * 64, groups), values.dtype)
    padded[: values.shape[0], : values.shape[1]] = values
    order = [g + 8 * i for g in range(8) for i in range(8)]
    return padded.reshape(slabs, 64, groups)[:, order].transpose(0, 2, 1).reshape(-1)


def integers(t: torch.Tensor) -> np.ndarray:
    """Values as unsigned integers of their size, so that bf16 has a numpy dtype and NaNs compare."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[t.element_size()]
    return raw(t).numpy().view(unsigned).reshape(t.shape)


def test_the_tests_layout_is_a_bijection() -> None:
    assert {at for places in LANES for at in places} == {(row, k) for row in range(16) for k in range(64)}
    assert set(PLANES) == {v.format.bits for v in VARIANTS}
    orders = {(v.format.bits, v.format.encoding is Encoding.CODEBOOK) for v in VARIANTS}
    assert orders == {(2, True), (3, True), (4, True), (5, True), (4, False), (8, False)}


@each_variant
@pytest.mark.parametrize(("n", "k"), [(64, 64), (70, 150), (1, 1), (130, 17)])
def test_bytes_are_those_of_the_layout(variant: Variant, n: int, k: int) -> None:
    for i, group_size in enumerate(variant.group_sizes(k)):
        weight = random_weight(variant, n, k, group_size)
        packed = weight.pack()
        if i == 0:  # codes know nothing of groups
            assert packed.codes.numpy().tobytes() == pack_codes(weight)
        assert np.array_equal(integers(packed.scales), pack_groups(integers(weight.scales), weight))
        assert (packed.zeros is None) == (weight.zeros is None)
        if weight.zeros is not None:
            assert packed.zeros is not None
            assert np.array_equal(integers(packed.zeros), pack_groups(integers(weight.zeros), weight))
        assert (packed.codebook is None) == (weight.codebook is None)
        if weight.codebook is not None:
            assert packed.codebook is not None
            assert torch.equal(packed.codebook, weight.codebook)
        parts = scale_parts(packed)
        assert parts.keys() == weight.tensors().keys() - {"codes", "scales", "zeros", "codebook"}
        assert all(torch.equal(part, getattr(weight, name)) for name, part in parts.items())
        assert all(t.dim() == 1 and t.is_contiguous() for t in packed.tensors().values())


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    variant = draw(st.sampled_from(VARIANTS))
    n, k = draw(st.integers(1, 200)), draw(st.integers(1, 200))
    return random_weight(variant, n, k, draw(st.sampled_from(variant.group_sizes(k))), draw(st.integers(0, 9)))


@given(weights())
def test_unpack_is_the_inverse(weight: QuantizedWeight) -> None:
    packed = weight.pack()
    assert isinstance(packed, PackedWeight)
    assert same_weight(packed.unpack(), weight)
    assert same_weight(packed.unpack().pack(), packed)
    assert packed.shape == weight.shape


@each_variant
def test_every_combination_and_group_size_round_trips(variant: Variant) -> None:
    """N and K around the block size, groups around K."""
    for n, k in [(1, 1), (1, 200), (200, 1), (63, 65), (64, 128), (65, 63), (17, 130)]:
        for group_size in variant.group_sizes(k):
            weight = random_weight(variant, n, k, group_size)
            assert same_weight(weight.pack().unpack(), weight)


@each_variant
def test_sizes(variant: Variant) -> None:
    """Packed = canonical + tail padding, nothing else; the C API says the same sizes."""
    library, sizes = c_library(), CxWeightSizes()
    for n, k in [(64, 256), (128, 512), (65, 257), (1, 1), (3, 100)]:
        for group_size in variant.group_sizes(k):
            weight = random_weight(variant, n, k, group_size)
            packed = weight.pack()
            rows, columns = -(-n // 64) * 64, -(-k // 64) * 64
            assert packed.codes.nbytes == rows * columns * variant.format.bits // 8
            groups = 1 if group_size >= k else -(-columns // group_size)
            count = weight.scales.numel() if weight.flat_scales else rows * groups
            assert packed.scales.numel() == count
            if n % 64 == 0 and k % 64 == 0 and (group_size >= k or k % group_size == 0):
                assert packed.nbytes == weight.nbytes
            struct = c_weight(packed)
            assert library.cx_weight_bytes(ctypes.byref(struct), ctypes.byref(sizes)) == 0
            assert (sizes.codes_bytes, sizes.scales_bytes) == (packed.codes.nbytes, packed.scales.nbytes)
            assert sizes.zeros_bytes == (0 if packed.zeros is None else packed.zeros.nbytes)
            nested = 0 if weight.nested_absmax is None else weight.nested_absmax.numel()
            assert sizes.nested_absmax_count == nested
            parts = scale_parts(packed)
            assert sum(t.numel() for t in parts.values()) == (0 if not parts else packed.scale_data.numel())
            assert ("nested_absmax" in parts) == (nested > 0)
            assert nested == 0 or parts["nested_absmax"].numel() == nested


@each_variant
def test_packing_is_deterministic_and_leaves_the_weight_alone(variant: Variant) -> None:
    """Padding has a value: packed weights of equal weights are equal bytes."""
    weight = random_weight(variant, 37, 90)
    copy = weight.map_tensors(torch.clone)
    first = weight.pack()
    assert same_weight(first, copy.pack("cpu"))
    assert same_weight(weight, copy)


@each_variant
def test_tensors_of_any_stride_pack(variant: Variant) -> None:
    """Slices of a larger file buffer, column-major scales."""
    weight = random_weight(variant, 37, 128)
    strided = weight.map_tensors(lambda t: torch.stack([t, t], dim=-1)[..., 0] if t.dim() else t)
    assert not strided.codes.is_contiguous()
    assert same_weight(strided.pack(), weight.pack())


def test_packed_weights_of_any_stride_run() -> None:
    """Codebooks and nested parts too, which packing takes over as they are."""
    assert VARIANTS
    refused = []
    for variant in VARIANTS:
        weight = random_weight(variant, 37, 128)
        strided = weight.map_tensors(lambda t: torch.stack([t, t], dim=-1)[..., 0] if t.dim() else t)
        try:
            assert torch.equal(strided.pack().dequantize(), weight.dequantize())
        except RuntimeError as error:
            refused.append(f"{variant}: {error}")
    assert refused == []


@each_variant
def test_tail_bits_do_not_reach_the_kernel(variant: Variant) -> None:
    """Bits behind the last code of a row may hold anything in a file."""
    k = 37
    weight = random_weight(variant, 5, k)
    used = k * variant.format.bits % 8
    if used == 0:
        assert variant.format.bits == 8
        return
    codes = weight.codes.clone()
    codes[:, -1] |= 256 - (1 << used)
    dirty = replace(weight, codes=codes)
    assert torch.equal(dirty.pack().dequantize(), weight.pack().dequantize())


def test_packed_repr_and_meaning() -> None:
    assert VARIANTS
    for variant in VARIANTS:
        weight = random_weight(variant, 9, 100)
        packed = weight.pack()
        assert repr(packed).startswith(f"PackedWeight({variant.format.name}, 9x100, ")
        assert packed.groups == weight.groups
        assert torch.equal(packed.dequantize(), weight.dequantize())


def test_wrong_tensors_are_refused() -> None:
    """Sizes that do not fit: an error naming the tensor, for both directions."""
    weight = random_weight(VARIANTS[0], 8, 128)
    packed = weight.pack()
    cases = [
        (replace(weight, codes=weight.codes[:-1]).pack, r"pack: weight\.codes_bytes: expected 512, got 448"),
        (replace(weight, scales=weight.scales[:, :1]).pack, r"pack: weight\.scales_bytes: expected 64, got 32"),
        (replace(weight, scales=weight.scales.half()).pack, r"pack: scales: expected .*Float, got .*Half"),
        (replace(weight, codes=weight.codes.int()).pack, r"pack: codes: expected .*Byte, got .*Int"),
        (replace(packed, codes=packed.codes[:-1]).unpack, r"unpack: weight\.codes_bytes: expected 4096, got 4095"),
        (replace(packed, scales=weight.scales).unpack, r"unpack: weight\.scales_bytes: expected 512, got 64"),
        (replace(packed, group_size=48).unpack, r"weight\.group_size: nf4 expects 32 or .*, got 48"),
        (replace(packed, n=0).unpack, r"weight: expected N and K in 1\.\..*, got N=0"),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
