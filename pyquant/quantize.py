"""Quantization: a floating-point weight becomes a canonical :class:`QuantizedWeight`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ._library import has_cuda
from .codes import pack_codes
from .formats import FLOAT_SCALES, Encoding, Format, ScaleType, ZeroType, get_format
from .hqq import refine_zeros
from .ops import make_spec
from .scales import (
    E4M3_MAX,
    FLOAT_DTYPES,
    LARGE_SUM,
    decode_absmax_e4m4,
    decode_e4m3,
    decode_e8m0,
    encode_absmax_e4m4,
    encode_e4m3,
    encode_e8m0,
    nest_absmax,
    nested_map,
    storage_dtype,
)
from .weight import QuantizedWeight

Method = Literal["rtn", "hqq"]

# Weights quantized at a time: bounds the temporaries (about 20 bytes a weight) to some hundred MB, and keeps indices
# far below 2^31 for weights of any size.
_CHUNK = 1 << 24

_NON_FINITE = "quantize: w: expected finite values, got NaN or Inf"


@dataclass(frozen=True)
class _Groups:
    """A chunk of groups, quantized."""

    codes: torch.Tensor  # uint8 [groups, group_size]
    scales: torch.Tensor  # stored form; fp32 absmax if they are to be nested
    zeros: torch.Tensor | None


def quantize(
    w: torch.Tensor,
    format: str = "nf4",
    group_size: int | None = None,
    nested: bool = False,
    *,
    codebook: torch.Tensor | None = None,
    scale_type: ScaleType | str | None = None,
    zero_type: ZeroType | str | None = None,
    method: Method = "rtn",
) -> QuantizedWeight:
    """Quantize ``w`` to ``format``.

    Args:
        w: [N, K] fp32, fp16 or bf16, any device and strides; N out_features, K in_features.
        format: a name of ``pyquant.formats.FORMATS``.
        group_size: consecutive k that share a scale; -1 for K; None for the format's default.
        nested: store absmax in 8 bits (bitsandbytes' double quantization); same as ``scale_type="nested"``.
        codebook: [2^bits] values in any order, in units of absmax, in place of the format's own; needed for
            ``codebook4``, which has none.
        scale_type: how scales are stored; None for the format's default, which for integer formats is w's dtype.
        zero_type: "integer" or "float", for formats with zero points; None for the format's default.
        method: "rtn" rounds to the nearest code. "hqq" also fits float zeros by HQQ's half-quadratic
            iteration (unsigned integer formats; Badri and Shaji, 2023).

    Returns:
        The canonical weight, on w's device.

    Raises:
        TypeError: when w is not a floating-point tensor.
        ValueError: on anything else that does not fit, NaN and Inf in w included.
    """
    fmt = get_format(format, "quantize")
    _check_weight(w)
    w = w.detach()
    n, k = w.shape
    scale_type = _scale_type(fmt, w, nested, scale_type)
    zero_type = _zero_type(fmt, zero_type, method)
    group_size = _group_size(fmt, group_size, k)
    if w.is_cuda and method == "rtn" and has_cuda():
        return _quantize_on_gpu(w, fmt, group_size, scale_type, zero_type, codebook)
    table = _codebook(fmt, codebook, w.device)
    tensor_scale = _tensor_scale(fmt, w, table)

    groups = -(-k // group_size)
    scale_shape = (-(-n * k // group_size),) if fmt.flat_blocks else (n, groups)
    nested_scales = scale_type is ScaleType.NESTED
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    # Absmax to be nested is kept in fp32 until all of it is known.
    scales = torch.empty(
        scale_shape, dtype=torch.float32 if nested_scales else storage_dtype(scale_type), device=w.device
    )
    zeros = None
    if zero_type is not ZeroType.NONE:
        zero_dtype = torch.uint8 if zero_type is ZeroType.INTEGER else scales.dtype
        zeros = torch.empty(scale_shape, dtype=zero_dtype, device=w.device)

    for piece in _pieces(fmt.flat_blocks, w, group_size, codes, scales, zeros):
        chunk = piece.w.float().reshape(piece.scales.numel(), -1)
        if not bool(torch.isfinite(chunk).all()):
            raise ValueError(_NON_FINITE)
        quantized = _quantize_groups(chunk, fmt, table, scale_type, zero_type, tensor_scale, method)
        piece.codes.copy_(quantized.codes.view(piece.codes.shape))
        piece.scales.copy_(quantized.scales.view(piece.scales.shape))
        if piece.zeros is not None and quantized.zeros is not None:
            piece.zeros.copy_(quantized.zeros.view(piece.zeros.shape))

    parts: dict[str, torch.Tensor] = {}
    if nested_scales:
        nest = nest_absmax(scales)
        scales = nest.codes
        parts = {"nested_map": nest.map, "nested_absmax": nest.absmax, "nested_offset": nest.offset}
    if codebook is not None:
        assert table is not None
        parts["codebook"] = table
    if tensor_scale is not None:
        parts["tensor_scale"] = tensor_scale
    if zeros is not None:
        parts["zeros"] = zeros
    packed = pack_codes(codes, fmt.bits)
    if not (fmt.flat_blocks and k % group_size):
        scales = scales.view(n, groups)
    return QuantizedWeight(fmt, n, k, group_size, scale_type, zero_type, packed, scales, **parts)


def check_settings(
    format: str = "nf4", group_size: int | None = None, *, k: int | None = None, **arguments: Any
) -> QuantizedWeight:
    """Raise as :func:`quantize` would for weights of K = ``k``, or, without ``k``, for settings that no weight could
    have.

    Returns:
        A weight of one row, with all settings filled in.
    """
    if k is None:
        k = group_size if group_size is not None and group_size > 0 else 64
    with torch.device("cpu"):  # not the meta device, on which others build models
        return quantize(torch.ones(1, k), format, group_size, **arguments)


def _quantize_on_gpu(
    w: torch.Tensor,
    fmt: Format,
    group_size: int,
    scale_type: ScaleType,
    zero_type: ZeroType,
    codebook: torch.Tensor | None,
) -> QuantizedWeight:
    """The same by ``torch.ops.pyquant.quantize``; the arguments are checked and complete."""
    own = codebook is not None or fmt.needs_codebook
    table = _codebook(fmt, codebook, torch.device("cpu")) if own else None
    map_ = nested_map(w.device).clone() if scale_type is ScaleType.NESTED else None
    spec = make_spec(fmt.id, scale_type, zero_type, group_size)
    codes, scales, zeros, absmax, scalar, status = torch.ops.pyquant.quantize(w, table, map_, spec)
    non_finite, large_scale, large_sum, _ = status.tolist()  # waits for the GPU
    if non_finite:
        raise ValueError(_NON_FINITE)
    if large_scale:
        largest = torch.tensor(large_scale, dtype=torch.int32).view(torch.float32).item()
        raise ValueError(_large_scale(scale_type, largest))
    if large_sum:
        raise ValueError(LARGE_SUM)
    n, k = w.shape
    shape = (-1,) if fmt.flat_blocks and k % group_size else (n, -1)
    parts: dict[str, torch.Tensor] = {}
    if map_ is not None:
        parts = {"nested_map": map_, "nested_absmax": absmax, "nested_offset": scalar.view(())}
    elif fmt.tensor_scale:
        parts["tensor_scale"] = scalar.view(())
    if table is not None:
        parts["codebook"] = table.to(w.device)
    if zero_type is not ZeroType.NONE:
        parts["zeros"] = zeros.view(shape)
    return QuantizedWeight(fmt, n, k, group_size, scale_type, zero_type, codes.view(n, -1), scales.view(shape), **parts)


def _check_weight(w: torch.Tensor) -> None:
    if not isinstance(w, torch.Tensor) or w.dtype not in FLOAT_DTYPES.values():
        got = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        raise TypeError(f"quantize: w: expected a tensor of fp32, fp16 or bf16, got {got}")
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"quantize: w: expected shape [N, K] with N, K >= 1, got {list(w.shape)}")


def _scale_type(fmt: Format, w: torch.Tensor, nested: bool, scale_type: ScaleType | str | None) -> ScaleType:
    if scale_type is None:
        if nested:
            chosen = ScaleType.NESTED
        elif fmt.encoding is not Encoding.CODEBOOK:
            chosen = next(t for t in FLOAT_SCALES if FLOAT_DTYPES[t] == w.dtype)
        else:
            chosen = fmt.scale_types[0]
    else:
        chosen = _enum(ScaleType, scale_type, "scale_type")
        if nested and chosen is not ScaleType.NESTED:
            raise ValueError(f"quantize: nested=True: expected no scale_type, got {chosen.name.lower()}")
    if chosen not in fmt.scale_types:
        allowed = ", ".join(t.name.lower() for t in fmt.scale_types)
        raise ValueError(f"quantize: scale_type: {fmt.name} expects one of {allowed}, got {chosen.name.lower()}")
    return chosen


def _zero_type(fmt: Format, zero_type: ZeroType | str | None, method: str) -> ZeroType:
    if method not in ("rtn", "hqq"):
        raise ValueError(f"quantize: method: expected 'rtn' or 'hqq', got {method!r}")
    if method == "hqq":
        if ZeroType.FLOAT not in fmt.zero_types:
            raise ValueError(f"quantize: method 'hqq' expects a format with float zeros, got {fmt.name}")
        if zero_type is not None and _enum(ZeroType, zero_type, "zero_type") is not ZeroType.FLOAT:
            raise ValueError(f"quantize: method 'hqq': zero_type: expected 'float', got {zero_type!r}")
        return ZeroType.FLOAT
    chosen = fmt.zero_types[0] if zero_type is None else _enum(ZeroType, zero_type, "zero_type")
    if chosen not in fmt.zero_types:
        allowed = ", ".join(t.name.lower() for t in fmt.zero_types)
        raise ValueError(f"quantize: zero_type: {fmt.name} expects one of {allowed}, got {chosen.name.lower()}")
    return chosen


def _enum(kind: type, value: object, argument: str):
    """The member of an IntEnum given itself or its lower-case name."""
    if isinstance(value, kind):
        return value
    names = [m.name.lower() for m in kind]  # type: ignore[attr-defined]
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"quantize: {argument}: expected one of {', '.join(names)}, got {value!r}")
    return kind[value.upper()]  # type: ignore[index]


def _group_size(fmt: Format, group_size: int | None, k: int) -> int:
    if group_size is None:
        group_size = fmt.group_size or k
    elif group_size == -1:
        group_size = k
    if not fmt.allows_group(group_size, k):
        raise ValueError(f"quantize: group_size: {fmt.name} expects {fmt.group_rule()}, got {group_size} (K={k})")
    return group_size


def _codebook(fmt: Format, codebook: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """The fp32 codebook on ``device``; None for integers."""
    if codebook is None:
        if fmt.needs_codebook:
            raise ValueError(f"quantize: codebook: {fmt.name} expects [{fmt.levels}] values, got none")
        return None if fmt.codebook is None else torch.tensor(fmt.codebook, device=device)
    if fmt.encoding is not Encoding.CODEBOOK:
        raise ValueError(f"quantize: codebook: {fmt.name} has integer codes, expected none")
    table = torch.as_tensor(codebook).detach().to(device, torch.float32)
    if table.shape != (fmt.levels,) or not bool(torch.isfinite(table).all()) or not bool((table != 0).any()):
        raise ValueError(
            f"quantize: codebook: expected [{fmt.levels}] finite values, not all zero, got {table.tolist()}"
        )
    return table.clone()


def _tensor_scale(fmt: Format, w: torch.Tensor, table: torch.Tensor | None) -> torch.Tensor | None:
    """NVFP4: the factor that maps the largest block scale to E4M3's largest value."""
    if not fmt.tensor_scale:
        return None
    assert table is not None
    absmax = torch.linalg.vector_norm(w, float("inf"), dtype=torch.float32)
    return torch.where(absmax > 0, absmax / (table.abs().max() * E4M3_MAX), torch.ones_like(absmax))


@dataclass(frozen=True)
class _Piece:
    """A part of the weight whose groups all have one length, and the parts of the outputs that belong to it."""

    w: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def _pieces(
    flat_blocks: bool,
    w: torch.Tensor,
    group_size: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
) -> Iterator[_Piece]:
    """Pieces of at most about ``_CHUNK`` weights; short groups come in pieces of their own."""
    if flat_blocks:  # one long row
        w, codes = w.reshape(1, -1), codes.view(1, -1)
        scales, zeros = scales.view(1, -1), None if zeros is None else zeros.view(1, -1)
    n, k = w.shape
    rows = max(1, _CHUNK // k)
    columns = max(1, _CHUNK // group_size)  # whole groups at a time
    whole = k // group_size
    spans = [(g, min(g + columns, whole)) for g in range(0, whole, columns)]
    if k % group_size:
        spans.append((whole, whole + 1))
    for start in range(0, n, rows):
        at = slice(start, start + rows)
        for first, last in spans:
            ks, groups = slice(first * group_size, min(last * group_size, k)), slice(first, last)
            part = None if zeros is None else zeros[at, groups]
            yield _Piece(w[at, ks], codes[at, ks], scales[at, groups], part)


def _quantize_groups(
    w: torch.Tensor,
    fmt: Format,
    table: torch.Tensor | None,
    scale_type: ScaleType,
    zero_type: ZeroType,
    tensor_scale: torch.Tensor | None,
    method: str,
) -> _Groups:
    """fp32 groups [groups, group_size] -> codes and scales, codes chosen for the scales as they will decode."""
    if fmt.encoding is Encoding.UNSIGNED:
        return _quantize_asymmetric(w, fmt, scale_type, zero_type, method)
    absmax = torch.linalg.vector_norm(w, float("inf"), dim=1)
    if fmt.encoding is Encoding.SIGNED:
        steps = fmt.levels // 2 - fmt.half_step
        stored, scales = _store_float(absmax / steps, scale_type)
        codes = torch.round(w * _reciprocal(scales)[:, None]).clamp_(-fmt.levels // 2, fmt.levels // 2 - 1)
        return _Groups((codes.to(torch.int16) & (fmt.levels - 1)).to(torch.uint8), stored, None)
    assert table is not None
    if scale_type is ScaleType.E8M0:
        # OCP MX: the exponent of absmax less that of the largest code.
        largest = torch.frexp(table.abs().max()).exponent - 1
        stored = encode_e8m0(torch.frexp(absmax).exponent - 1 - largest)
        stored = torch.where(absmax > 0, stored, torch.zeros_like(stored))
        scales = decode_e8m0(stored)
    elif scale_type is ScaleType.E4M3:
        assert tensor_scale is not None
        stored = encode_e4m3(absmax / table.abs().max() / tensor_scale)
        scales = decode_e4m3(stored) * tensor_scale
    elif scale_type is ScaleType.E4M4:
        stored = encode_absmax_e4m4(absmax)
        scales = decode_absmax_e4m4(stored)
    elif scale_type is ScaleType.NESTED:
        stored = scales = absmax  # bitsandbytes chooses codes before it nests; so do we, for equal codes
    else:
        stored, scales = _store_float(absmax, scale_type)
    return _Groups(_nearest(w * _reciprocal(scales)[:, None], table, fmt.ties_to_even), stored, None)


def _quantize_asymmetric(
    w: torch.Tensor, fmt: Format, scale_type: ScaleType, zero_type: ZeroType, method: str
) -> _Groups:
    """Codes 0 .. 2^bits - 1 over the range of each group; ``w = (q - zero) * scale``."""
    low, high = w.amin(dim=1), w.amax(dim=1)
    if zero_type is ZeroType.INTEGER:
        low, high = low.clamp(max=0), high.clamp(min=0)  # so that the zero point is one of the codes
    # A constant group: its value is one step away from the zero point.
    span = torch.where(high > low, (high - low) / (fmt.levels - 1), low.abs())
    stored, scales = _store_float(span, scale_type)
    inverse = _reciprocal(scales)
    zeros = -low * inverse
    if zero_type is ZeroType.INTEGER:
        zeros = torch.round(zeros).clamp_(0, fmt.levels - 1)
        stored_zeros = zeros.to(torch.uint8)
    else:
        if method == "hqq":
            zeros = refine_zeros(w, inverse, zeros, fmt.levels)
        stored_zeros = zeros.to(FLOAT_DTYPES[scale_type])
        zeros = stored_zeros.float()
    codes = torch.round(w * inverse[:, None] + zeros[:, None]).clamp_(0, fmt.levels - 1)
    return _Groups(codes.to(torch.uint8), stored, stored_zeros)


def _store_float(scales: torch.Tensor, scale_type: ScaleType) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in their stored dtype, and those in fp32."""
    stored = scales.to(FLOAT_DTYPES[scale_type])
    if not bool(torch.isfinite(stored).all()):
        raise ValueError(_large_scale(scale_type, scales.max().item()))
    return stored, stored.float()


def _large_scale(scale_type: ScaleType, scale: float) -> str:
    return f"quantize: scale_type: {scale_type.name.lower()} cannot hold a scale of {scale:.3g}"


def _reciprocal(scales: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for a scale of 0, so that a group of zeros becomes zeros."""
    inverse = 1 / scales
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(inverse))


def _nearest(x: torch.Tensor, table: torch.Tensor, ties_to_even: bool) -> torch.Tensor:
    """Index of the table entry nearest to each x; the table is in any order."""
    values, codes = torch.sort(table, stable=True)
    middle = (values[1:].double() + values[:-1].double()).div_(2).float()
    if ties_to_even:
        # bucketize gives a tie to the lower entry; where the upper one has the even code, move the boundary down.
        upper_even = codes[1:] % 2 == 0
        middle = torch.where(upper_even, torch.nextafter(middle, torch.full_like(middle, -torch.inf)), middle)
    return codes.to(torch.uint8)[torch.bucketize(x.contiguous(), middle, out_int32=True)]
