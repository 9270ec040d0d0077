"""The format table: what every code means, known codebooks, and that Python and C++ hold the same table."""

from __future__ import annotations

import ctypes
import struct
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import (
    FLOAT_DTYPES,
    VARIANTS,
    CxWeight,
    CxWeightSizes,
    Variant,
    c_library,
    code_values,
    each_format,
    each_variant,
    user_codebook,
)

from pyquant import QuantizedWeight, _library
from pyquant.codes import pack_codes
from pyquant.formats import FORMATS, Encoding, Format, ScaleType, ZeroType, format_by_id, get_format

# The integers in files: a row may be added, never changed.
IDS = {
    "nf4": 0,
    "fp4": 1,
    "int4": 2,
    "uint4": 3,
    "kbit2": 4,
    "kbit3": 5,
    "kbit4": 6,
    "kbit5": 7,
    "codebook4": 8,
    "mxfp4": 9,
    "nvfp4": 10,
    "int8": 11,
}
SCALE_IDS = {"FP32": 0, "FP16": 1, "BF16": 2, "E4M4": 3, "E4M3": 4, "E8M0": 5, "NESTED": 6}
ZERO_IDS = {"NONE": 0, "INTEGER": 1, "FLOAT": 2}

NF4_HEX = (
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
FP4_HEX = (
    "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000 "
    "80000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000"
)
# One in each scale type; nested: the map's last entry, times 1, plus 0.
ONE = {ScaleType.E4M4: 0xB0, ScaleType.E4M3: 0x38, ScaleType.E8M0: 127, ScaleType.NESTED: 255}


def hex_of(values: object) -> str:
    return " ".join(struct.pack(">f", v).hex() for v in values)  # type: ignore[attr-defined]


def unit_weight(variant: Variant) -> QuantizedWeight:
    """Every code in every place of a byte and of a k16 step, with scale 1 and zero 0."""
    fmt, k = variant.format, 512
    codes = ((torch.arange(fmt.levels)[:, None] + torch.arange(k)[None, :]) % fmt.levels).to(torch.uint8)
    group = fmt.group_size or k
    shape = (fmt.levels, k // group)
    if variant.scale_type in FLOAT_DTYPES:
        scales = torch.ones(shape, dtype=FLOAT_DTYPES[variant.scale_type])
    else:
        scales = torch.full(shape, ONE[variant.scale_type], dtype=torch.uint8)
    parts: dict[str, torch.Tensor] = {}
    if variant.scale_type is ScaleType.NESTED:
        parts["nested_map"] = torch.linspace(-1, 1, 256)
        parts["nested_absmax"] = torch.ones(-(-scales.numel() // 256))
        parts["nested_offset"] = torch.zeros(())
    if variant.zero_type is not ZeroType.NONE:
        dtype = torch.uint8 if variant.zero_type is ZeroType.INTEGER else scales.dtype
        parts["zeros"] = torch.zeros(shape, dtype=dtype)
    if fmt.needs_codebook:
        parts["codebook"] = user_codebook(fmt)
    if fmt.tensor_scale:
        parts["tensor_scale"] = torch.ones(())
    weight = QuantizedWeight(
        fmt,
        fmt.levels,
        k,
        group,
        variant.scale_type,
        variant.zero_type,
        pack_codes(codes, fmt.bits),
        scales,
        **parts,
    )
    weight.check()
    return weight


@each_variant
def test_every_code_decodes_to_the_tables_value(variant: Variant) -> None:
    weight = unit_weight(variant)
    codes = (np.arange(weight.n)[:, None] + np.arange(weight.k)[None, :]) % variant.format.levels
    expected = torch.from_numpy(code_values(weight)[codes]).float()
    assert len(np.unique(codes)) == variant.format.levels
    assert torch.equal(weight.dequantize(), expected)
    assert torch.equal(weight.pack().dequantize(), expected)


def test_ids_are_stable() -> None:
    assert {name: f.id for name, f in FORMATS.items()} == IDS
    assert {m.name: m.value for m in ScaleType} == SCALE_IDS
    assert {m.name: m.value for m in ZeroType} == ZERO_IDS


def test_all_combinations_are_tested() -> None:
    assert len(VARIANTS) == sum(len(f.scale_types) * len(f.zero_types) for f in FORMATS.values())
    assert {v.format.name for v in VARIANTS} == set(IDS)
    assert {v.scale_type for v in VARIANTS} == set(ScaleType)
    assert {v.zero_type for v in VARIANTS} == set(ZeroType)


@each_format
def test_a_row_is_sound(fmt: Format) -> None:
    assert fmt.bits in (2, 3, 4, 5, 8)
    assert len(set(fmt.scale_types)) == len(fmt.scale_types) > 0
    assert len(set(fmt.zero_types)) == len(fmt.zero_types) > 0
    assert fmt.codebook is None or (fmt.encoding is Encoding.CODEBOOK and len(fmt.codebook) == fmt.levels)
    assert fmt.tensor_scale == (ScaleType.E4M3 in fmt.scale_types)
    assert fmt.allows_group(fmt.group_size or 1000, 1000)
    assert get_format(fmt.name) is format_by_id(fmt.id) is fmt


def test_unknown_names_and_ids() -> None:
    with pytest.raises(ValueError, match=r"format: expected one of nf4, .*int8, got 'nf5'"):
        get_format("nf5")
    for format_id in (-1, len(FORMATS)):
        with pytest.raises(ValueError, match=rf"format id: expected 0\.\.11, got {format_id}"):
            format_by_id(format_id)


def test_nf4_and_fp4_are_those_of_bitsandbytes() -> None:
    assert FORMATS["nf4"].codebook is not None
    assert FORMATS["fp4"].codebook is not None
    assert hex_of(FORMATS["nf4"].codebook) == NF4_HEX
    assert hex_of(FORMATS["fp4"].codebook) == FP4_HEX
    twelfths = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    assert np.array_equal(np.float32(FORMATS["fp4"].codebook[:8]), np.float32(twelfths))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_e2m1(name: str) -> None:
    codebook = FORMATS[name].codebook
    assert codebook is not None
    for code, value in enumerate(codebook):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert abs(value) == magnitude
        assert np.signbit(value) == bool(code & 8)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_kbit_codebooks_are_normal_quantiles(bits: int) -> None:
    """Quantiles at (i + 1/2) / 2^k, over the largest: equal to one unit in the last place."""
    codebook = FORMATS[f"kbit{bits}"].codebook
    assert codebook is not None
    levels = 1 << bits
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / levels) for i in range(levels)])
    expected = np.float32(quantiles / quantiles.max())
    got = np.float32(codebook)
    assert np.array_equal(got.astype(np.float64), codebook), "an entry is no fp32 number"
    assert np.array_equal(got, -got[::-1])
    assert bool((np.abs(got - expected) <= np.spacing(np.abs(expected))).all())


def test_python_and_compiled_table_are_equal() -> None:
    compiled = _library.formats()
    assert len(compiled) == len(FORMATS) > 0
    for fmt, row in zip(FORMATS.values(), compiled, strict=True):
        codebook = row.pop("codebook")
        assert row == {
            "id": fmt.id,
            "name": fmt.name,
            "bits": fmt.bits,
            "is_codebook": fmt.encoding is Encoding.CODEBOOK,
            "is_signed": fmt.encoding is Encoding.SIGNED,
            "flat_blocks": fmt.flat_blocks,
            "tensor_scale": fmt.tensor_scale,
            "scale_types": sum(1 << t for t in fmt.scale_types),
            "zero_types": sum(1 << t for t in fmt.zero_types),
        }
        assert (codebook is None) == (fmt.codebook is None)
        if codebook is not None:
            assert hex_of(codebook) == hex_of(fmt.codebook), fmt.name  # -0.0 included


@each_format
def test_both_tables_allow_the_same_group_sizes(fmt: Format) -> None:
    """The C table does not show its group sizes; its checks do."""
    library, sizes = c_library(), CxWeightSizes()
    allowed = 0
    for k in (1, 48, 100, 4096):
        for group in sorted({*range(-1, 140), 256, 512, 1024, 2048, 4096, 8192, 3 * 64, 4095, k}):
            weight = CxWeight(
                format=fmt.id, scale_type=fmt.scale_types[0], zero_type=fmt.zero_types[0], n=3, k=k, group_size=group
            )
            status = library.cx_weight_bytes(ctypes.byref(weight), ctypes.byref(sizes))
            assert (status == 0) == fmt.allows_group(group, k), (k, group)
            allowed += status == 0
    assert allowed > 0
