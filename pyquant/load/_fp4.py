"""E2M1 codes with block scales: MXFP4 and NVFP4 of gpt-oss, compressed-tensors and ModelOpt."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..formats import FORMATS, ScaleType, ZeroType
from ..scales import decode_e4m3
from ..weight import QuantizedWeight
from ._layer import FLOATS, LoadedLayer, Parts

_RAW = (torch.uint8, torch.float8_e8m0fnu)
_E8M0_NAN = 255


def mxfp4(tensors: Mapping[str, torch.Tensor], prefix: str) -> LoadedLayer:
    """An MXFP4 layer of compressed-tensors.

    ``dequantize`` is ``value * 2^(scale - 127)``: a power of two, so exact wherever the dtype's range allows.

    Args:
        tensors: a state dict: ``<prefix>.weight_packed`` uint8 [N, K / 2], low nibble first; ``.weight_scale`` E8M0 in
            uint8 or float8_e8m0fnu [N, K / 32]; ``.bias`` [N].
        prefix: the layer's name.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others.
    """
    parts = Parts("mxfp4", tensors, prefix)
    codes = parts.get("weight_packed", torch.uint8, (None, None))
    weight = _mx_weight(parts, codes, parts.get("weight_scale", _RAW), "weight_scale")
    return LoadedLayer(weight, parts.bias(weight.n))


def mxfp4_experts(tensors: Mapping[str, torch.Tensor], prefix: str) -> list[LoadedLayer]:
    """The experts of a gpt-oss projection, one layer each.

    ``dequantize`` is ``value * 2^(scale - 127)``, as :func:`mxfp4`; rows are output channels, which transformers
    transposes after it dequantizes.

    Args:
        tensors: a state dict: ``<prefix>_blocks`` uint8 [E, N, K / 32, 16], ``<prefix>_scales`` uint8 [E, N, K / 32],
            ``<prefix>_bias`` [E, N].
        prefix: the projection's name, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others.
    """
    module, _, name = prefix.rpartition(".")
    parts = Parts("mxfp4_experts", tensors, module)
    blocks = parts.get(f"{name}_blocks", torch.uint8, (None, None, None, 16))
    experts, n, groups, _ = blocks.shape
    scales = parts.get(f"{name}_scales", torch.uint8, (experts, n, groups))
    bias_name = f"{name}_bias"
    bias = parts.get(bias_name, FLOATS, (experts, n)) if bias_name in parts else None
    return [
        LoadedLayer(
            _mx_weight(parts, blocks[e].reshape(n, groups * 16), scales[e], f"{name}_scales"),
            None if bias is None else bias[e],
        )
        for e in range(experts)
    ]


def nvfp4(tensors: Mapping[str, torch.Tensor], prefix: str) -> LoadedLayer:
    """An NVFP4 layer of ModelOpt or compressed-tensors.

    ``dequantize`` is ``value * (scale * tensor_scale)`` in fp32, rounded once, as ModelOpt's. compressed-tensors
    divides scales by its global scale instead. Where no fp32 factor gives all the same products in fp16 and bf16, the
    quotients are stored as fp32 scales in a ``codebook4`` weight, so that they do.

    Args:
        tensors: a state dict, of ModelOpt: ``<prefix>.weight`` uint8 [N, K / 2], low nibble first, ``.weight_scale``
            float8_e4m3fn [N, K / 16], ``.weight_scale_2`` fp32, one value. Of compressed-tensors: ``.weight_packed``,
            ``.weight_scale``, ``.weight_global_scale`` fp32, one value. ``.bias`` [N]. Scales of activations are not
            read.
        prefix: the layer's name.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others; ModelOpt's ``pre_quant_scale`` (AWQ) or
            low-rank part (SVDQuant).
    """
    parts = Parts("nvfp4", tensors, prefix)
    for other in ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"):
        if other in parts:
            parts.refuse(other, "expected none: the layer does more than multiply with its weight; export plain NVFP4")
    divides = "weight_global_scale" in parts
    codes = parts.get("weight_packed" if divides else "weight", torch.uint8, (None, None))
    n, k = codes.shape[0], 2 * codes.shape[1]
    if codes.numel() == 0 or k % 16:
        parts.refuse("weight_packed" if divides else "weight", f"expected [N, K / 2] with K % 16 == 0, got {n} x {k}")
    scales = parts.get("weight_scale", (torch.float8_e4m3fn, torch.uint8), (n, k // 16)).view(torch.uint8)
    if not bool(torch.isfinite(decode_e4m3(scales)).all()):
        parts.refuse("weight_scale", "expected finite values, got NaN")
    name = "weight_global_scale" if divides else "weight_scale_2"
    factor = parts.finite(name, torch.float32)
    if factor.numel() != 1 or (divides and float(factor) == 0):
        parts.refuse(name, f"expected one value{' other than 0' if divides else ''}, got {factor.tolist()}")
    factor = factor.reshape(())
    if divides:
        reciprocal = _reciprocal(scales, factor)
        if reciprocal is None:
            return LoadedLayer(parts.checked(_quotients(codes, scales, factor, n, k)), parts.bias(n))
        factor = reciprocal
    weight = QuantizedWeight(
        FORMATS["nvfp4"], n, k, 16, ScaleType.E4M3, ZeroType.NONE, codes, scales, tensor_scale=factor
    )
    return LoadedLayer(parts.checked(weight), parts.bias(n))


def _mx_weight(parts: Parts, codes: torch.Tensor, scales: torch.Tensor, scale_name: str) -> QuantizedWeight:
    n, k = codes.shape[0], 2 * codes.shape[1]
    if codes.numel() == 0 or k % 32 or scales.shape != (n, k // 32):
        parts.refuse(scale_name, f"expected [{n}, {k} / 32], got {list(scales.shape)}")
    scales = scales.view(torch.uint8)
    if bool((scales == _E8M0_NAN).any()):
        parts.refuse(scale_name, "expected finite values, got NaN (255)")
    return parts.checked(
        QuantizedWeight(
            FORMATS["mxfp4"], n, k, 32, ScaleType.E8M0, ZeroType.NONE, codes.contiguous(), scales.contiguous()
        )
    )


def _reciprocal(scales: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor | None:
    """A factor whose products with E2M1 values and these scales round, in fp16 and bf16, as the quotients do."""
    used = decode_e4m3(torch.unique(scales))
    values = torch.tensor(FORMATS["nvfp4"].codebook, device=scales.device)
    expected = values * (used / divisor)[:, None]
    nearest = 1 / divisor
    up, down = (torch.nextafter(nearest, torch.full_like(nearest, limit)) for limit in (torch.inf, -torch.inf))
    for factor in (nearest, up, down):
        products = values * (used * factor)[:, None]
        if all(torch.equal(products.to(dtype), expected.to(dtype)) for dtype in (torch.float16, torch.bfloat16)):
            return factor
    return None


def _quotients(codes: torch.Tensor, scales: torch.Tensor, divisor: torch.Tensor, n: int, k: int) -> QuantizedWeight:
    codebook = torch.tensor(FORMATS["nvfp4"].codebook, device=codes.device)
    quotients = decode_e4m3(scales) / divisor
    return QuantizedWeight(
        FORMATS["codebook4"], n, k, 16, ScaleType.FP32, ZeroType.NONE, codes, quotients, codebook=codebook
    )
