"""Encoding and decoding of scales: E4M4, E4M3, E8M0 and nested absmax."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .formats import NESTED_BLOCK, ScaleType

FLOAT_DTYPES = {
    ScaleType.FP32: torch.float32,
    ScaleType.FP16: torch.float16,
    ScaleType.BF16: torch.bfloat16,
}
E4M4_MAX = 31.0
E4M3_MAX = 448.0
LARGE_SUM = "quantize: nested: expected absmax values whose sum is finite in fp32, got larger ones"


def storage_dtype(scale_type: ScaleType) -> torch.dtype:
    """The dtype in which scales of this type are stored; 8-bit types are raw bytes."""
    return FLOAT_DTYPES.get(scale_type, torch.uint8)


def encode_absmax_e4m4(absmax: torch.Tensor) -> torch.Tensor:
    """fp32 >= 0 -> uint8 E4M4 (4 exponent bits, bias 11, 4 mantissa bits, no sign).

    Rounds to nearest even, carries into the exponent, saturates at 31; steps of 2^-14 below 2^-10.

    Raises:
        ValueError: on negative or NaN values.
    """
    a = absmax.float()
    if not bool((a >= 0).all()):
        raise ValueError("encode_absmax_e4m4: absmax: expected values >= 0, got negative or NaN values")
    a = a.clamp(max=E4M4_MAX)
    bits = a.view(torch.int32)
    # Round the 23-bit mantissa to 4 bits; a carry runs into the exponent by itself. Then the bias 127 becomes 11.
    normal = ((bits + 0x3FFFF + ((bits >> 19) & 1)) >> 19) - ((127 - 11) << 4)
    subnormal = torch.round(a * 2.0**14).int()  # 16 is the code of 2^-10
    return torch.where(a < 2.0**-10, subnormal, normal).clamp(max=255).to(torch.uint8)


def decode_absmax_e4m4(codes: torch.Tensor) -> torch.Tensor:
    """uint8 E4M4 -> fp32, exact."""
    exponent, mantissa = (codes >> 4).float(), (codes & 15).float()
    normal = torch.exp2(exponent - 11) * (1 + mantissa / 16)
    return torch.where(codes < 16, mantissa * 2.0**-14, normal)


def encode_e4m3(scales: torch.Tensor) -> torch.Tensor:
    """fp32 >= 0 -> raw bytes of float8_e4m3fn, saturating at 448."""
    return scales.float().clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """Raw bytes of float8_e4m3fn -> fp32, exact."""
    return codes.view(torch.float8_e4m3fn).float()


def encode_e8m0(exponents: torch.Tensor) -> torch.Tensor:
    """Integer exponents -> uint8 with value 2^(byte - 127), saturating at both ends."""
    return (exponents + 127).clamp(0, 254).to(torch.uint8)


def decode_e8m0(codes: torch.Tensor) -> torch.Tensor:
    """uint8 -> fp32 2^(byte - 127), exact; 255 is NaN."""
    # Through float64, where 2^-127 is a normal number: exp2 in fp32 may flush it to zero.
    values = torch.exp2(codes.double() - 127).float()
    return torch.where(codes == 255, torch.full_like(values, float("nan")), values)


@functools.cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 sorted values of bitsandbytes' signed dynamic 8-bit map.

    For each decade 10^-6 .. 10^0, 1, 2, 4, .. 64 midpoints of equal steps in [0.1, 1], of both signs; then 0 and 1.
    """
    values = [0.0, 1.0]
    for i in range(7):
        steps = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (steps[:-1] + steps[1:]) / 2
        scaled = (10.0 ** (i - 6)) * means
        values += scaled.tolist() + (-scaled).tolist()
    return tuple(sorted(values))


@functools.cache
def nested_map(device: torch.device) -> torch.Tensor:
    """:func:`dynamic_map` as fp32 on ``device``; one tensor for all callers, so to be copied before it is stored."""
    return torch.tensor(dynamic_map(), dtype=torch.float32, device=device)


@dataclass(frozen=True)
class NestedScales:
    """Absmax in 8 bits: ``map[codes] * absmax[block // 256] + offset``."""

    codes: torch.Tensor  # uint8 [blocks]
    map: torch.Tensor  # fp32 [256]
    absmax: torch.Tensor  # fp32 [ceil(blocks / 256)]
    offset: torch.Tensor  # fp32, 0-dim


def nest_absmax(absmax: torch.Tensor) -> NestedScales:
    """fp32 absmax [blocks], in flat block order -> 8-bit absmax (bitsandbytes' double quantization)."""
    absmax = absmax.view(-1)
    offset = absmax.mean()
    if not bool(torch.isfinite(offset)):
        raise ValueError(LARGE_SUM)
    blocks = absmax.numel()
    centred = torch.nn.functional.pad(absmax - offset, (0, -blocks % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    second = centred.abs().amax(dim=1)
    values = nested_map(absmax.device).clone()
    boundaries = (values[1:] + values[:-1]) / 2
    normalised = centred / torch.where(second > 0, second, torch.ones_like(second))[:, None]
    codes = torch.bucketize(normalised, boundaries).to(torch.uint8)
    return NestedScales(codes.view(-1)[:blocks].contiguous(), values, second, offset)


def unnest_absmax(
    codes: torch.Tensor, map_: torch.Tensor, absmax: torch.Tensor, offset: torch.Tensor | float
) -> torch.Tensor:
    """The inverse of :func:`nest_absmax`, fp32 [blocks]; ``codes`` in flat block order."""
    flat = codes.reshape(-1)
    second = absmax.repeat_interleave(NESTED_BLOCK)[: flat.numel()]
    return map_[flat.int()] * second + offset
