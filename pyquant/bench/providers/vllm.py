"""Marlin and Machete: kernels of vLLM's operator library, ``torch.ops._C``."""

from __future__ import annotations

import torch

from ...weight import QuantizedWeight
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

# vLLM's number for its type "uint4b8", unsigned 4 bits that stand for code - 8. The fields, from bit 0: exponent bits
# (8), mantissa bits (8), signed (1), bias (32), finite values only (1), how NaN is written (8).
_UINT4B8 = 4 << 8 | 8 << 17 | 1 << 50


def _require_operators(*names: str) -> None:
    require(
        all(hasattr(torch.ops._C, name) for name in names),
        "no vLLM operator library with "
        + " and ".join(f"_C::{name}" for name in names)
        + " is loaded (--load-library PATH of vLLM's _C library)",
    )


def _require_bf16(source: Source) -> None:
    # vLLM 0.25.1 on an H200, fp16: one of these two did not return (2026-11-21; not looked into).
    require(source.dtype is torch.bfloat16, "it is measured with bf16 activations only")


def _gptq_codes(weight: QuantizedWeight) -> torch.Tensor:
    """Eight codes along K in an int32, the lowest k in the lowest bits: [K / 8, N], strides (1, K / 8)."""
    return unsigned_codes(weight).view(torch.int32).t()


def marlin_scales(weight: QuantizedWeight) -> torch.Tensor:
    """[K / group, N], with those of columns 8 apart side by side in each 64: what one thread needs."""
    return weight.scales.t().reshape(-1, 8, 8).transpose(1, 2).reshape(-1, weight.n).contiguous()


class Marlin(Provider):
    """``_C::marlin_gemm``."""

    name = "marlin"

    def build(self, source: Source) -> Operand:
        _require_operators("gptq_marlin_repack", "marlin_gemm")
        _require_bf16(source)
        n, k = source.n, source.k
        require(n % 64 == 0 and k % 128 == 0, "N must be a multiple of 64, and K of 128")
        weight = peer_weight(source)
        none = torch.empty(0, dtype=torch.int32, device="cuda")
        codes = torch.ops._C.gptq_marlin_repack(_gptq_codes(weight).contiguous(), none, k, n, 4, False)
        scales = marlin_scales(weight)
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        locks = torch.zeros(4 * processors, dtype=torch.int32, device="cuda")

        def call(tensors: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            return torch.ops._C.marlin_gemm(
                x,
                None,  # y: the operator allocates it
                tensors[0],
                None,  # bias
                tensors[1],
                None,  # scales of x
                None,  # tensor scale
                None,  # zeros
                none,  # group index
                none,  # permutation
                locks,
                _UINT4B8,
                x.shape[0],
                n,
                k,
                True,  # all of K is there
                False,  # no atomic additions
                True,  # reduce in fp32
                False,  # no float zeros
            )

        nbytes = tensor_bytes(codes, scales)
        return Operand((codes, scales), call, nbytes, str(PEER_SPEC), weight.group_size, peer_reference(source))


class Machete(Provider):
    """``_C::machete_mm`` (sm_90)."""

    name = "machete"

    def build(self, source: Source) -> Operand:
        _require_operators("machete_prepack_B", "machete_mm")
        _require_bf16(source)
        require(torch.cuda.get_device_capability()[0] == 9, "it is for sm_90")
        require(source.n % 128 == 0 and source.k % 64 == 0, "N must be a multiple of 128, and K of 64")
        weight = peer_weight(source)
        codes = torch.ops._C.machete_prepack_B(_gptq_codes(weight), source.dtype, _UINT4B8, source.dtype)
        scales = weight.scales.t().contiguous()
        group = weight.group_size

        def call(tensors: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
            # After the weight's type: y's type, scales, zeros, group size, scales of columns and of x, schedule.
            return torch.ops._C.machete_mm(x, tensors[0], _UINT4B8, None, tensors[1], None, group, None, None, None)

        nbytes = tensor_bytes(codes, scales)
        return Operand((codes, scales), call, nbytes, str(PEER_SPEC), group, peer_reference(source))
