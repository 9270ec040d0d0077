"""Integer codes of any producer as canonical weights."""

from __future__ import annotations

import torch

from ..codes import pack_codes, row_bytes, unpack_codes
from ..formats import FORMATS, Encoding, ScaleType, ZeroType
from ..scales import FLOAT_DTYPES
from ..weight import QuantizedWeight
from ._layer import Parts

_SCALE_TYPES = {dtype: scale_type for scale_type, dtype in FLOAT_DTYPES.items()}


def scale_type_of(scales: torch.Tensor) -> ScaleType:
    """The scale type of fp32, fp16 or bf16 scales."""
    return _SCALE_TYPES[scales.dtype]


def words_to_stream(words: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """int32 [R, W], a little-endian bit stream in each row -> its first ``count`` codes as uint8 [R, bytes].

    Bits behind the last code are zero in the result.
    """
    rows = words.shape[0]
    # Flat first: a contiguous tensor with a dimension of one may have strides that view() does not take.
    stream = words.reshape(-1).view(torch.uint8).view(rows, -1)[:, : row_bytes(count, bits)].clone()
    used = count * bits % 8
    if used:
        stream[:, -1] &= (1 << used) - 1
    return stream


def stream_to_words(stream: torch.Tensor) -> torch.Tensor:
    """The inverse for rows of whole words: uint8 [R, 4 * W] -> int32 [R, W]."""
    return stream.contiguous().view(torch.int32)


def unsigned_codes(weight: QuantizedWeight, bits: int) -> torch.Tensor:
    """The codes of ``bits`` bits that :func:`integer_weight` made the weight of: uint8 [N, K]."""
    codes = unpack_codes(weight.codes, weight.k, weight.format.bits)
    if weight.format.encoding is not Encoding.SIGNED:
        return codes
    return (codes + (1 << (bits - 1))) & ((1 << bits) - 1)


def integer_weight(
    parts: Parts,
    stream: torch.Tensor,
    bits: int,
    k: int,
    group_size: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
) -> QuantizedWeight:
    """``w = (code - zero) * scale`` with unsigned codes and integer zeros, in the smallest format that holds it.

    Where every zero is the middle code ``2^(bits-1)`` the weight is symmetric: ``int4`` for up to 4 bits, ``int8`` for
    up to 8. Else ``uint4``, for up to 4 bits. Codes of fewer bits are widened.

    Args:
        parts: for the names in errors.
        stream: uint8 [N, ceil(K * bits / 8)], a little-endian bit stream per row, zero behind the last code.
        bits: 1..8.
        k: K.
        group_size: consecutive k that share a scale.
        scales: fp32, fp16 or bf16 [N, groups].
        zeros: uint8 [N, groups]; None for the middle code.
    """
    n = stream.shape[0]
    middle = 1 << (bits - 1)
    if zeros is not None and bool((zeros == middle).all()):
        zeros = None
    if zeros is not None and bits > 4:
        parts.refuse("weight", f"{bits}-bit codes with zero points: expected symmetric codes, or at most 4 bits")
    width = 4 if bits <= 4 else 8
    if bits == width:
        codes = stream
        if zeros is None:  # two's complement: the top bit flips
            codes = stream ^ (0x88 if width == 4 else 0x80)
            if width == 4 and k % 2:
                codes[:, -1] &= 0x0F
    else:
        codes = unpack_codes(stream, k, bits)
        if zeros is None:
            codes = (codes - middle) & ((1 << width) - 1)
        codes = pack_codes(codes, width)
    name = "uint4" if zeros is not None else f"int{width}"
    zero_type = ZeroType.NONE if zeros is None else ZeroType.INTEGER
    return parts.checked(
        QuantizedWeight(
            FORMATS[name], n, k, group_size, scale_type_of(scales), zero_type, codes.contiguous(),
            scales.contiguous(), None if zeros is None else zeros.contiguous(),
        )
    )  # fmt: skip
