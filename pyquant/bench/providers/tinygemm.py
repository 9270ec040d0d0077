"""tinygemm: torch's own GPU kernel for 4-bit weights."""

from __future__ import annotations

import torch

from .base import (
    PEER_SPEC,
    Operand,
    Provider,
    Source,
    peer_reference,
    peer_weight,
    require,
    tensor_bytes,
    unsigned_codes,
)

_INNER_K_TILES = 8


class Tinygemm(Provider):
    """``aten::_weight_int4pack_mm``."""

    name = "tinygemm"

    def build(self, source: Source) -> Operand:
        require(source.dtype is torch.bfloat16, "its activations are bf16 only")
        require(source.n % 8 == 0, "N must be a multiple of 8")
        require(source.k % (_INNER_K_TILES * 16) == 0, f"K must be a multiple of {_INNER_K_TILES * 16}")
        weight = peer_weight(source)
        codes = unsigned_codes(weight)
        # It wants the lower k of a byte in the upper bits.
        packed = torch.ops.aten._convert_weight_to_int4pack(codes << 4 | codes >> 4, _INNER_K_TILES)
        # (code - 8) * scale + zero, with scale and zero side by side: [K / group, N, 2].
        scales = weight.scales.t()
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
        group = weight.group_size

        def call(tensors: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, tensors[0], group, tensors[1])

        nbytes = tensor_bytes(packed, scales_and_zeros)
        return Operand((packed, scales_and_zeros), call, nbytes, str(PEER_SPEC), group, peer_reference(source))
