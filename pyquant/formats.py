"""The table of weight formats: one row per format, the only place where a format is stated.

A stored weight is ``w[n, k] = decode(code[n, k]) * scale[n, k // group_size]``, or
``(code - zero) * scale`` for formats with a zero point. A row says how codes decode, which scales and
zeros may stand beside them, and how groups run over the weight. Everything else (quantizer, packed
layout, kernels, tests, the C++ header) is derived from the rows; ``kernels/generate.py`` writes them to
``format_table.gen.hpp``. This module imports nothing but the standard library, so that the build can
read it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum


class ScaleType(IntEnum):
    """How the scale of a group is stored. The integers cross the op boundary and stand in files."""

    FP32 = 0
    FP16 = 1
    BF16 = 2
    E4M4 = 3  # uint8, no sign, exponent bias 11: 2^-14 .. 31 (bitsandbytes k-bit)
    E4M3 = 4  # uint8, OCP float8_e4m3fn; times the fp32 `tensor_scale` of the weight (NVFP4)
    E8M0 = 5  # uint8, 2^(s - 127) (OCP MX)
    NESTED = 6  # uint8 index into a 256-entry map, times an fp32 per 256 blocks, plus an offset


class ZeroType(IntEnum):
    """What is subtracted from the code before the scale."""

    NONE = 0
    INTEGER = 1  # uint8 per group; not packed to 4 bits, because GPTQ v1 checkpoints hold 16
    FLOAT = 2  # in code units, stored in the scale's dtype (HQQ)


class Encoding(IntEnum):
    """How a code becomes a number."""

    SIGNED = 0  # two's complement
    UNSIGNED = 1
    CODEBOOK = 2  # index into 2^bits fp32 values


FLOAT_SCALES = (ScaleType.FP32, ScaleType.FP16, ScaleType.BF16)
NESTED_BLOCK = 256  # absmax values that share one second-level fp32 scale
NESTED_MAP_SIZE = 256  # entries of the first-level map


@dataclass(frozen=True)
class Format:
    """One row: what a weight format is, by its properties.

    Attributes:
        name: what users write.
        id: the integer that crosses the op boundary and stands in files; never reused.
        bits: bits per code (2, 3, 4, 5 or 8).
        encoding: how a code becomes a number.
        codebook: the 2^bits fp32 values of a codebook format, unless the weight brings its own; None for
            integers, and for codebook formats whose weights always bring one.
        scale_types: allowed scales, the default first.
        zero_types: allowed zero points, the default first.
        group_sizes: allowed group sizes; empty means any power of two from 16 up, or K.
        group_size: the default; 0 means K (one scale per output channel).
        flat_blocks: True when groups run over the flattened [N * K] weight (bitsandbytes), so that they
            cross row ends if K is no multiple of the group size. Else every row starts a group, and the
            last group of a row may be short.
        tensor_scale: True when one fp32 per weight multiplies all scales.
        half_step: integer formats map absmax to ``2^(bits-1) - half_step`` steps; 0.5 uses all codes with
            no error above half a step (GPTQ, compressed-tensors), 1 is the usual symmetric int8.
        ties_to_even: a value halfway between two codebook entries takes the even code (OCP rounding);
            otherwise the lower entry (bitsandbytes).
        source: where the format comes from.
    """

    name: str
    id: int
    bits: int
    encoding: Encoding
    scale_types: tuple[ScaleType, ...]
    source: str
    codebook: tuple[float, ...] | None = None
    zero_types: tuple[ZeroType, ...] = (ZeroType.NONE,)
    group_sizes: tuple[int, ...] = ()
    group_size: int = 64
    flat_blocks: bool = False
    tensor_scale: bool = False
    half_step: float = 0.5
    ties_to_even: bool = False

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def bias(self) -> int:
        """Added to a code when it is packed, so that packed integer codes are unsigned."""
        return self.levels // 2 if self.encoding is Encoding.SIGNED else 0

    @property
    def needs_codebook(self) -> bool:
        """True when every weight brings its codebook."""
        return self.encoding is Encoding.CODEBOOK and self.codebook is None

    def allows_group(self, group_size: int, k: int) -> bool:
        """Whether rows of ``k`` weights may be quantized in groups of ``group_size``."""
        if self.group_sizes:
            return group_size in self.group_sizes
        return group_size == k or (group_size >= 16 and group_size & (group_size - 1) == 0)

    def group_rule(self) -> str:
        """The rule behind :meth:`allows_group`, for error messages."""
        if self.group_sizes:
            return " or ".join(map(str, self.group_sizes))
        return "a power of two >= 16, or K"


def _fp32(hex_bits: str) -> tuple[float, ...]:
    return tuple(struct.unpack(">f", bytes.fromhex(word))[0] for word in hex_bits.split())


def _symmetric(*magnitudes: float) -> tuple[float, ...]:
    values = [struct.unpack("f", struct.pack("f", v))[0] for v in magnitudes]
    return tuple([-v for v in reversed(values)] + values)


# bitsandbytes' NormalFloat: sorted, with an exact zero at code 7.
_NF4 = _fp32(
    "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000 "
    "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000"
)
# bitsandbytes' FP4: sign in bit 3, magnitudes {0, 1/16, 8, 12, 4, 6, 2, 3} / 12; not E2M1, not monotone.
_FP4_MAGNITUDES = "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
_FP4 = _fp32(_FP4_MAGNITUDES) + tuple(-v for v in _fp32(_FP4_MAGNITUDES))
# OCP E2M1 (MXFP4, NVFP4): sign in bit 3.
_E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = _E2M1_MAGNITUDES + tuple(-v for v in _E2M1_MAGNITUDES)
# bitsandbytes' k-bit normal float: quantiles of the normal distribution at (i + 1/2) / 2^k over the largest.
_NORMAL_FLOAT = {
    2: _symmetric(0.27699357, 1.0),
    3: _symmetric(0.10254128, 0.31860366, 0.57827693, 1.0),
    4: _symmetric(0.042095385, 0.12734099, 0.2159463, 0.31090474, 0.41681889, 0.54220915, 0.70756882, 1.0),
    5: _symmetric(
        0.018188655,
        0.054678146,
        0.091509081,
        0.12892599,
        0.16720095,
        0.20664923,
        0.24765123,
        0.29068497,
        0.33637723,
        0.38558921,
        0.43957144,
        0.50026846,
        0.57099831,
        0.65825421,
        0.77810454,
        1.0,
    ),
}

_BNB_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_ABSMAX = (ScaleType.FP32, ScaleType.NESTED, ScaleType.FP16, ScaleType.BF16, ScaleType.E4M4)
_CODEBOOK = Encoding.CODEBOOK


def _kbit(bits: int) -> Format:
    return Format(
        name=f"kbit{bits}",
        id=2 + bits,
        bits=bits,
        encoding=_CODEBOOK,
        codebook=_NORMAL_FLOAT[bits],
        scale_types=(ScaleType.E4M4, ScaleType.FP16, ScaleType.FP32),
        group_sizes=(32,),
        group_size=32,
        flat_blocks=True,
        source="bitsandbytes k-bit",
    )


# fmt: off
_ROWS = (
    Format("nf4", 0, 4, _CODEBOOK, _ABSMAX, "bitsandbytes", codebook=_NF4,
           group_sizes=_BNB_BLOCKSIZES, flat_blocks=True),
    Format("fp4", 1, 4, _CODEBOOK, _ABSMAX, "bitsandbytes", codebook=_FP4,
           group_sizes=_BNB_BLOCKSIZES, flat_blocks=True),
    Format("int4", 2, 4, Encoding.SIGNED, FLOAT_SCALES, "CUTLASS int4b_t, GPTQ sym, compressed-tensors"),
    Format("uint4", 3, 4, Encoding.UNSIGNED, FLOAT_SCALES, "HQQ, AWQ, GPTQ asym, tinygemm",
           zero_types=(ZeroType.INTEGER, ZeroType.FLOAT)),
    _kbit(2), _kbit(3), _kbit(4), _kbit(5),
    Format("codebook4", 8, 4, _CODEBOOK, _ABSMAX, "learned codebooks"),
    Format("mxfp4", 9, 4, _CODEBOOK, (ScaleType.E8M0,), "OCP MX", codebook=_E2M1,
           group_sizes=(32,), group_size=32, ties_to_even=True),
    Format("nvfp4", 10, 4, _CODEBOOK, (ScaleType.E4M3,), "NVFP4", codebook=_E2M1,
           group_sizes=(16,), group_size=16, tensor_scale=True, ties_to_even=True),
    Format("int8", 11, 8, Encoding.SIGNED, FLOAT_SCALES, "W8A16", group_size=0, half_step=1.0),
)
# fmt: on

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}


def get_format(name: str, function: str = "get_format") -> Format:
    """The row called ``name``.

    Raises:
        ValueError: when there is no such row; the message names ``function`` and lists all rows.
    """
    if name not in FORMATS:
        raise ValueError(f"{function}: format: expected one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def format_by_id(format_id: int) -> Format:
    """The row whose ``id`` is ``format_id`` (ids are row numbers).

    Raises:
        ValueError: when there is no such row.
    """
    if not 0 <= format_id < len(_ROWS):
        raise ValueError(f"format id: expected 0..{len(_ROWS) - 1}, got {format_id}")
    return _ROWS[format_id]
