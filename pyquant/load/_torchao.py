"""torchao's Int4 tensors (plain and tile-packed) and tinygemm's packed layout, which is the latter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..codes import pack_codes, row_bytes
from ..formats import FORMATS, ZeroType
from ..weight import QuantizedWeight
from ._integers import scale_type_of
from ._layer import FLOATS, LoadedLayer, Parts

_MIDDLE = 8  # the code of a weight that equals the zero
_LANES, _TILE_N, _TILE_K = 32, 8, 16


def torchao(
    tensors: Mapping[str, torch.Tensor], prefix: str, *, shape: Sequence[int] | None = None, kind: str | None = None
) -> LoadedLayer:
    """A layer of torchao's ``Int4WeightOnlyConfig``: packing format ``plain`` or ``tile_packed_to_4d``.

    torchao's weight is ``(code - 8) * scale + zero`` with the zero in weight units. Where all zeros are 0 it becomes
    ``int4``, exactly. Else ``uint4`` with fp32 scales and the zeros ``8 - zero / scale`` in fp32: within
    ``2^-23 * (|w| + 16 * scale)`` of torchao's value, so in bf16 a weight that lies halfway between two numbers may
    round to the other one.

    Args:
        tensors: a state dict as torchao flattens it for safetensors. Plain: ``<prefix>._weight_qdata`` int8 or uint8
            [N, K / 2], low nibble first, two's complement, ``._weight_scale`` and ``._weight_zero_point``
            [K / group_size, N]. Tile-packed: see :func:`tinygemm`; ``._weight_qdata`` and ``._weight_scale_and_zero``.
            ``.bias`` [N].
        prefix: the layer's name.
        shape: [N, K] of a tile-packed weight, which is stored with padding; None if there is none.
        kind: the class of the tensor, ``_type`` of torchao's metadata, so that others are refused; None if unknown.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others; another class; ``act_pre_scale``.
    """
    parts = Parts("torchao", tensors, prefix)
    if kind not in (None, "Int4Tensor", "Int4TilePackedTo4dTensor"):
        parts.refuse(
            "weight", f"expected Int4Tensor or Int4TilePackedTo4dTensor, whose layouts are documented, got {kind}"
        )
    if "_weight_act_pre_scale" in parts:
        parts.refuse("_weight_act_pre_scale", "expected none: it scales activations, which a weight cannot do")
    if "_weight_scale_and_zero" in parts:
        weight = _tile_packed(parts, "_weight_qdata", "_weight_scale_and_zero", shape)
        return LoadedLayer(weight, parts.bias(weight.n))
    qdata = parts.get("_weight_qdata", (torch.int8, torch.uint8), (None, None)).view(torch.uint8)
    n, k = qdata.shape[0], 2 * qdata.shape[1]
    scales = parts.finite("_weight_scale", FLOATS, (None, n))
    zeros = parts.finite("_weight_zero_point", FLOATS, scales.shape)
    groups = scales.shape[0]
    if qdata.numel() == 0 or groups == 0 or k % groups:
        parts.refuse("_weight_scale", f"expected [K / group_size, N] for {n} x {k}, got {list(scales.shape)}")
    weight = _weight(parts, qdata ^ 0x88, k, k // groups, scales.t(), zeros.t())
    return LoadedLayer(weight, parts.bias(n))


def tinygemm(
    packed: torch.Tensor, scales_and_zeros: torch.Tensor, *, shape: Sequence[int] | None = None
) -> LoadedLayer:
    """The operands of ``aten::_weight_int4pack_mm`` on CUDA as a canonical weight.

    The arithmetic is that of :func:`torchao`.

    Args:
        packed: int32 [N / 8, K / (16 * t), 32, t / 2], what ``aten::_convert_weight_to_int4pack`` returns for
            ``innerKTiles`` t = 2, 4 or 8.
        scales_and_zeros: bf16 [K / group_size, N, 2].
        shape: [N, K] without padding; None if there is none.

    Raises:
        LoadError: shapes or dtypes that do not fit.
    """
    parts = Parts("tinygemm", {"packed": packed, "scales_and_zeros": scales_and_zeros}, "")
    return LoadedLayer(_tile_packed(parts, "packed", "scales_and_zeros", shape))


def _tile_packed(parts: Parts, packed_name: str, scale_name: str, shape: Sequence[int] | None) -> QuantizedWeight:
    packed = parts.get(packed_name, torch.int32, (None, None, _LANES, None))
    n_tiles, k_blocks, _, words = packed.shape
    if words not in (1, 2, 4) or packed.numel() == 0:
        parts.refuse(packed_name, f"expected [N / 8, K / (16 t), 32, t / 2] with t = 2, 4, 8, got {list(packed.shape)}")
    n, k = n_tiles * _TILE_N, k_blocks * words * 2 * _TILE_K
    both = parts.finite(scale_name, FLOATS, (None, n, 2))
    groups = both.shape[0]
    if groups == 0 or k % groups:
        parts.refuse(scale_name, f"expected [K / group_size, {n}, 2] with K={k}, got {list(both.shape)}")
    group_size = k // groups
    rows, columns = (n, k) if shape is None else shape
    if not (n - _TILE_N < rows <= n and 0 < columns <= k):
        parts.refuse(packed_name, f"expected the packed form of [{rows}, {columns}], got that of [{n}, {k}]")
    # A lane holds row lane / 4; a word holds, for k8 step j of two k16 tiles, k = 2 * (lane % 4) in nibble j and the
    # next k in nibble 4 + j.
    lanes = packed.view(n_tiles, k_blocks, _TILE_N, 4, words)
    nibbles = torch.stack([((lanes >> (4 * i)) & 0x0F).to(torch.uint8) for i in range(8)], dim=-1)
    codes = nibbles.view(n_tiles, k_blocks, _TILE_N, 4, words, 2, 4).permute(0, 2, 1, 4, 6, 3, 5).reshape(n, k)
    used = -(-columns // group_size)
    scales, zeros = (both[:used, :rows, i].t() for i in range(2))
    if used == 1:
        group_size = min(group_size, columns)
    return _weight(parts, pack_codes(codes[:rows, :columns], 4), columns, group_size, scales, zeros)


def _weight(
    parts: Parts, stream: torch.Tensor, k: int, group_size: int, scales: torch.Tensor, zeros: torch.Tensor
) -> QuantizedWeight:
    """``(code - 8) * scale + zero``; codes unsigned and packed, scales and zeros [N, groups]."""
    stream = stream[:, : row_bytes(k, 4)]
    if not bool(zeros.any()):
        codes = stream ^ 0x88
        if k % 2:
            codes[:, -1] &= 0x0F
        return parts.checked(
            QuantizedWeight(
                FORMATS["int4"], stream.shape[0], k, group_size, scale_type_of(scales), ZeroType.NONE,
                codes.contiguous(), scales.contiguous(),
            )
        )  # fmt: skip
    if bool(((scales == 0) & (zeros != 0)).any()):
        parts.refuse("weight", "a scale of 0 with a zero point other than 0: no code stands for its weights")
    offsets = (
        torch.where(scales == 0, torch.zeros_like(zeros), zeros).double()
        / torch.where(scales == 0, torch.ones_like(scales), scales).double()
    )
    return parts.checked(
        QuantizedWeight(
            FORMATS["uint4"], stream.shape[0], k, group_size, scale_type_of(scales.float()), ZeroType.FLOAT,
            stream.contiguous(), scales.float().contiguous(), (_MIDDLE - offsets).float().contiguous(),
        )
    )  # fmt: skip
