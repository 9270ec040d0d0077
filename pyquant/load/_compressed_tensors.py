"""compressed-tensors: ``pack-quantized`` integers; its FP4 formats are those of ``_fp4.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..codes import unpack_codes
from ._fp4 import mxfp4, nvfp4
from ._integers import integer_weight, words_to_stream
from ._layer import FLOATS, LoadedLayer, Parts


def compressed_tensors(
    tensors: Mapping[str, torch.Tensor], prefix: str, *, num_bits: int | None = None, group_size: int | None = None
) -> LoadedLayer:
    """A compressed-tensors layer: ``pack-quantized``, ``nvfp4-pack-quantized`` or ``mxfp4-pack-quantized``.

    For integers ``dequantize`` is ``(code - zero) * scale``: the difference is exact, so one rounding in any dtype, as
    compressed-tensors' own in the scales' dtype. Symmetric weights become ``int4`` or ``int8``; others, up to 4 bits,
    ``uint4``. For FP4 see :func:`nvfp4` and :func:`mxfp4`.

    Args:
        tensors: a state dict: ``<prefix>.weight_packed`` int32 [N, ceil(K * num_bits / 32)], ``.weight_scale``
            [N, groups] in fp16, bf16 or fp32, ``.weight_shape`` int64 [2], for asymmetric weights
            ``.weight_zero_point`` int32 [ceil(N * num_bits / 32), groups], ``.bias`` [N].
        prefix: the layer's name.
        num_bits: 1..8, of the ``quantization_config``; None to derive it from the shapes; FP4 does not need it.
        group_size: of the ``quantization_config``; -1 for K; None to derive it from the shapes.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others; zero points with more than 4 bits;
            ``weight_g_idx``, which compressed-tensors has removed.
    """
    parts = Parts("compressed_tensors", tensors, prefix)
    packed_dtype = getattr(parts.raw("weight_packed"), "dtype", None)
    if packed_dtype == torch.uint8:
        return (nvfp4 if "weight_global_scale" in parts else mxfp4)(tensors, prefix)
    if "weight_g_idx" in parts:
        parts.refuse("weight_g_idx", "expected no act-order (actorder=group): compressed-tensors itself removed it")
    n, k = parts.get("weight_shape", (torch.int64, torch.int32), (2,), any_device=True).tolist()
    if n < 1 or k < 1:
        parts.refuse("weight_shape", f"expected [N, K], got {[n, k]}")
    if num_bits is None:
        num_bits = _bits(parts, n, k)
    if type(num_bits) is not int or not 1 <= num_bits <= 8:
        parts.refuse("num_bits", f"expected 1..8, got {num_bits!r}")
    packed = parts.get("weight_packed", torch.int32, (n, -(-k * num_bits // 32)))
    scales = parts.finite("weight_scale", FLOATS)
    if scales.numel() == 1:  # one for the whole weight
        scales = scales.reshape(1, 1).expand(n, 1)
    if scales.dim() != 2 or scales.shape[0] != n or scales.shape[1] < 1:
        parts.refuse("weight_scale", f"expected [{n}, groups], got {list(scales.shape)}")
    groups = scales.shape[1]
    size = -(-k // groups) if group_size is None else k if group_size == -1 else group_size
    if size < 1 or groups != -(-k // size):
        parts.refuse("weight_scale", f"expected ceil({k} / group_size) columns, got {groups} with group_size {size}")
    zeros = None
    if "weight_zero_point" in parts:
        words = parts.get("weight_zero_point", torch.int32, (-(-n * num_bits // 32), groups))
        zeros = unpack_codes(words_to_stream(words.t(), n, num_bits), n, num_bits).t()
    stream = words_to_stream(packed, k, num_bits)
    return LoadedLayer(integer_weight(parts, stream, num_bits, k, size, scales, zeros), parts.bias(n))


def _bits(parts: Parts, n: int, k: int) -> int:
    """The one number of bits that gives the stored number of words."""
    words = parts.get("weight_packed", torch.int32, (n, None)).shape[1]
    fitting = [bits for bits in range(1, 9) if -(-k * bits // 32) == words]
    if len(fitting) != 1:
        parts.refuse("weight_packed", f"expected [{n}, ceil({k} * num_bits / 32)], got {words} columns; give num_bits")
    return fitting[0]
