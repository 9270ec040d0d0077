"""Parts of a canonical weight: a range of its rows or of its columns, as a weight of its own."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from .codes import pack_codes, unpack_codes
from .formats import NESTED_BLOCK, ScaleType
from .weight import PackedWeight, QuantizedWeight

_NAMES = ("N", "K")


def narrow(weight: QuantizedWeight, dim: int, start: int, length: int) -> QuantizedWeight:
    """Rows (``dim`` 0) or columns (``dim`` 1) ``start`` .. ``start + length``: see ``QuantizedWeight.narrow``."""
    if dim not in (0, 1, -2, -1):
        raise ValueError(f"narrow: dim: expected 0 (N) or 1 (K), got {dim}")
    dim %= 2
    size, stop = weight.shape[dim], start + length
    if start < 0 or length < 1 or stop > size:
        raise ValueError(f"narrow: expected a part of {_NAMES[dim]}={size}, got {start} .. {stop}")
    if length == size:
        return weight.map_tensors(torch.clone)
    part = _rows(weight, start, stop) if dim == 0 else _columns(weight, start, stop)
    part.check()
    return part


def shard(weight: QuantizedWeight, dim: int, rank: int, world_size: int) -> QuantizedWeight:
    """Part ``rank`` of ``world_size`` equal ones: see ``QuantizedWeight.shard``."""
    if not 0 <= rank < world_size:
        raise ValueError(f"shard: rank: expected 0..{world_size - 1}, got {rank}")
    length = _part_length(weight, dim, world_size)
    return narrow(weight, dim, rank * length, length)


def check_shards(weight: QuantizedWeight | PackedWeight, dim: int, world_size: int) -> None:
    """Raise the ValueError that :func:`shard` would raise for any of the ranks."""
    length = _part_length(weight, dim, world_size)
    for start in range(0, weight.shape[dim] if world_size > 1 else 0, length):
        if dim % 2 == 1:
            _group_size(weight, start, start + length)
        elif weight.flat_scales and start * weight.k % weight.group_size != 0:
            _group_size(weight, 0, weight.k)


def _part_length(weight: QuantizedWeight | PackedWeight, dim: int, world_size: int) -> int:
    if dim not in (0, 1, -2, -1):
        raise ValueError(f"shard: dim: expected 0 (N) or 1 (K), got {dim}")
    size = weight.shape[dim]
    if size % world_size != 0:
        raise ValueError(f"shard: {_NAMES[dim % 2]}={size} does not divide by world_size={world_size}")
    return size // world_size


def _rows(w: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    codes = w.codes[start:stop].clone()
    if w.flat_scales:
        # A part's blocks start with its first weight.
        if start * w.k % w.group_size == 0:
            first, last = start * w.k // w.group_size, -(-stop * w.k // w.group_size)
            return _take(replace(w, n=stop - start, codes=codes), first, last)
        return _regroup(w, start, stop, 0, w.k, codes)
    return _take(replace(w, n=stop - start, codes=codes), start, stop)


def _take(w: QuantizedWeight, first: int, last: int) -> QuantizedWeight:
    """``w`` with the scales and zeros ``first`` .. ``last`` of their first dimension."""
    parts = {name: t[first:last].clone() for name in ("scales", "zeros") if (t := getattr(w, name)) is not None}
    if w.scale_type is ScaleType.NESTED:
        per_index = w.scales[0].numel()
        if first * per_index % NESTED_BLOCK != 0:
            w = _without_nesting(w)
            parts["scales"] = w.scales[first:last].clone()
        else:
            blocks = slice(first * per_index // NESTED_BLOCK, -(-last * per_index // NESTED_BLOCK))
            parts["nested_absmax"] = w.nested_parts()[2][blocks].clone()
    return replace(w, **parts)


def _columns(w: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    bits = w.format.bits
    if start * bits % 8 == 0 and (stop * bits % 8 == 0 or stop == w.k):
        codes = w.codes[:, start * bits // 8 : -(-stop * bits // 8)].clone(memory_format=torch.contiguous_format)
    else:
        codes = pack_codes(unpack_codes(w.codes, w.k, bits)[:, start:stop], bits)
    return _regroup(w, 0, w.n, start, stop, codes)


def _regroup(w: QuantizedWeight, top: int, bottom: int, left: int, right: int, codes: torch.Tensor) -> QuantizedWeight:
    """Rows ``top`` .. ``bottom``, columns ``left`` .. ``right``, in the largest groups that hold one scale each."""
    k, size = right - left, _group_size(w, left, right)
    if w.scale_type is ScaleType.NESTED:
        # 256 consecutive absmax of the part do not share the second-level scale that they had.
        w = _without_nesting(w)
    rows = torch.arange(top, bottom, device=w.device)[:, None]
    columns = torch.arange(left, right, size, device=w.device)[None, :]
    flat, by_row = (rows * w.k + columns) // w.group_size, rows * w.groups + columns // w.group_size
    index = flat if w.flat_scales else by_row
    parts = {name: t.reshape(-1)[index] for name in ("scales", "zeros") if (t := getattr(w, name)) is not None}
    return replace(w, n=bottom - top, k=k, group_size=size, codes=codes, **parts)


def _group_size(w: QuantizedWeight | PackedWeight, left: int, right: int) -> int:
    """Of the columns ``left`` .. ``right``: each group within one group of ``w``."""
    k, size = right - left, w.group_size
    if w.flat_scales:
        sizes = [math.gcd(size, w.k, left, k)]
    elif left // size == (right - 1) // size:
        sizes = [k, math.gcd(size, left, k)]  # all in one group
    elif right == w.k and not w.format.flat_blocks:
        sizes = [math.gcd(size, left)]  # the last group may be short
    else:
        sizes = [math.gcd(size, left, k)]
    for candidate in sizes:
        if w.format.allows_group(candidate, k):
            return candidate
    where = "groups that cross row ends" if w.flat_scales else "groups"
    raise ValueError(
        f"narrow: columns {left} .. {right} of K={w.k} with {where} of {size}: {w.format.name} expects groups of "
        f"{w.format.group_rule()}, and only groups of {sizes[-1]} hold one scale each"
    )


def _without_nesting(w: QuantizedWeight) -> QuantizedWeight:
    """Nested scales as the fp32 values that they stand for."""
    return replace(
        w,
        scale_type=ScaleType.FP32,
        scales=w.decode_scales(),
        nested_map=None,
        nested_absmax=None,
        nested_offset=None,
    )
