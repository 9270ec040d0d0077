"""bitsandbytes ``Linear4bit``: NF4 and FP4, absmax in fp32 or nested, any ``quant_storage``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from ..codes import pack_codes
from ..formats import FORMATS, NESTED_BLOCK, NESTED_MAP_SIZE, Format, ScaleType, ZeroType
from ..weight import QuantizedWeight
from ._layer import LoadedLayer, Parts

QUANT_STATE = "weight.quant_state.bitsandbytes__"
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F
# Words that are swapped at a time: they stay in a cache, and are too few for torch to share out among threads, whose
# meeting at the end of each small operation would cost far more than it saves where other processes use the cores.
_PIECE = 1 << 14


def bitsandbytes(tensors: Mapping[str, torch.Tensor], prefix: str) -> LoadedLayer:
    """A ``Linear4bit`` of a bitsandbytes checkpoint.

    ``dequantize`` is bitsandbytes' own: ``code * absmax`` in fp32, rounded once; nested absmax is
    ``map[index] * nested_absmax + offset`` in fp32. The stored ``quant_map`` is kept where it is not the format's.

    Args:
        tensors: a state dict: ``<prefix>.weight`` [bytes of N * K / 2 codes, 1] in uint8 or any other storage dtype,
            ``.weight.absmax``, ``.weight.quant_map``, ``.weight.quant_state.bitsandbytes__nf4`` or ``__fp4`` (JSON
            in uint8), for nested absmax also ``.weight.nested_absmax`` and ``.weight.nested_quant_map``; ``.bias``.
        prefix: the layer's name.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others.
    """
    parts = Parts("bitsandbytes", tensors, prefix)
    key = parts.find([QUANT_STATE + "nf4", QUANT_STATE + "fp4"])
    fmt = FORMATS[key.removeprefix(QUANT_STATE)]
    state = _quant_state(parts, key)
    n, k, blocksize = _geometry(parts, key, state, fmt)
    blocks = -(-n * k // blocksize)

    scale_parts: dict[str, torch.Tensor] = {}
    if "weight.nested_absmax" in parts:
        scale_type = ScaleType.NESTED
        absmax = parts.get("weight.absmax", torch.uint8, (blocks,))
        scale_parts = _nested(parts, key, state, blocks)
    else:
        scale_type = ScaleType.FP32
        absmax = parts.finite("weight.absmax", torch.float32, (blocks,))
    values = parts.finite("weight.quant_map", torch.float32, (fmt.levels,))
    if not torch.equal(values, torch.tensor(fmt.codebook, device=values.device)):
        scale_parts["codebook"] = values
    if k % blocksize == 0:
        absmax = absmax.view(n, -1)
    codes = _codes(parts, n, k)
    weight = QuantizedWeight(fmt, n, k, blocksize, scale_type, ZeroType.NONE, codes, absmax, **scale_parts)
    return LoadedLayer(parts.checked(weight), parts.bias(n))


def _quant_state(parts: Parts, key: str) -> dict[str, Any]:
    blob = parts.get(key, torch.uint8, (None,), any_device=True)
    try:
        state = json.loads(bytes(blob.tolist()))
    except (ValueError, RecursionError) as error:
        parts.refuse(key, f"expected JSON, got something else: {error}")
    if not isinstance(state, dict):
        parts.refuse(key, f"expected a JSON object, got {type(state).__name__}")
    return state


def _geometry(parts: Parts, key: str, state: dict[str, Any], fmt: Format) -> tuple[int, int, int]:
    if state.get("quant_type") != fmt.name:
        parts.refuse(key, f"quant_type: expected {fmt.name!r}, got {state.get('quant_type')!r}")
    shape, blocksize = state.get("shape"), state.get("blocksize")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and s > 0 for s in shape):
        parts.refuse(key, f"shape: expected [N, K], got {shape!r}")
    if type(blocksize) is not int or blocksize not in fmt.group_sizes:
        parts.refuse(key, f"blocksize: expected {fmt.group_rule()}, got {blocksize!r}")
    return shape[0], shape[1], blocksize


def _nested(parts: Parts, key: str, state: dict[str, Any], blocks: int) -> dict[str, torch.Tensor]:
    if state.get("nested_blocksize") != NESTED_BLOCK:
        parts.refuse(key, f"nested_blocksize: expected {NESTED_BLOCK}, got {state.get('nested_blocksize')!r}")
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)) or not abs(offset) <= torch.finfo(torch.float32).max:
        parts.refuse(key, f"nested_offset: expected a finite number, got {offset!r}")
    absmax = parts.finite("weight.nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),))
    return {
        "nested_absmax": absmax,
        "nested_map": parts.finite("weight.nested_quant_map", torch.float32, (NESTED_MAP_SIZE,)),
        "nested_offset": torch.tensor(offset, dtype=torch.float32, device=absmax.device),
    }


def _codes(parts: Parts, n: int, k: int) -> torch.Tensor:
    """The flat codes, high nibble first, as rows with the low nibble first."""
    stored = parts.get("weight", _STORAGE)
    flat = stored.reshape(-1).view(torch.uint8)
    size = (n * k + 1) // 2
    if not size <= flat.numel() < size + stored.element_size():
        parts.refuse("weight", f"expected {size} bytes for {n} x {k} codes, got {flat.numel()}")
    flat = flat[:size]
    if k % 2 == 0:
        return _swap_nibbles(flat).view(n, k // 2)
    codes = torch.stack([flat >> 4, flat & 0x0F], dim=1).view(-1)[: n * k]
    return pack_codes(codes.view(n, k), 4)


def _swap_nibbles(flat: torch.Tensor) -> torch.Tensor:
    """uint8 [R], the two nibbles of each byte exchanged."""
    if flat.device.type != "cpu" or flat.numel() % 8 or flat.storage_offset() % 8:
        return (flat >> 4) | (flat << 4)
    # Eight bytes at a time, in pieces: four times as fast as byte by byte over the whole weight.
    out = torch.empty_like(flat)
    for source, target in zip(flat.view(torch.int64).split(_PIECE), out.view(torch.int64).split(_PIECE), strict=True):
        torch.bitwise_right_shift(source, 4, out=target)
        target &= _LOW_NIBBLES
        target |= (source & _LOW_NIBBLES) << 4
    return out
