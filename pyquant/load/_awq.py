"""AWQ, ``version: gemm``: 4-bit codes packed along N in an interleaved order."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..codes import pack_codes
from ..weight import QuantizedWeight
from ._integers import integer_weight, unsigned_codes
from ._layer import FLOATS, LoadedLayer, Parts

# Nibble j of a word is column _ORDER[j] of its eight.
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(
    tensors: Mapping[str, torch.Tensor], prefix: str, *, group_size: int | None = None, version: str = "gemm"
) -> LoadedLayer:
    """An AWQ layer in 4 bits.

    ``dequantize`` is ``(code - zero) * scale``: the difference is exact, so one rounding in any dtype, as AWQ's own in
    fp16.

    Args:
        tensors: a state dict: ``<prefix>.qweight`` int32 [K, N / 8], ``.qzeros`` int32 [groups, N / 8] (missing:
            symmetric, zero 8), ``.scales`` [groups, N] in fp16, bf16 or fp32, ``.bias`` [N].
        prefix: the layer's name.
        group_size: of the ``quantization_config``; -1 for K; None to derive it from the shapes.
        version: of the ``quantization_config``; "gemm".

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others; or another version.
    """
    parts = Parts("awq", tensors, prefix)
    if version.lower() != "gemm":
        parts.refuse("version", f"expected 'gemm', whose layout is read here, got {version!r}")
    qweight = parts.get("qweight", torch.int32, (None, None))
    k, n = qweight.shape[0], qweight.shape[1] * 8
    if k == 0 or n == 0:
        parts.refuse("qweight", f"expected [K, N / 8], got {list(qweight.shape)}")
    scales = parts.finite("scales", FLOATS, (None, n))
    groups = scales.shape[0]
    size = -(-k // max(groups, 1)) if group_size is None else k if group_size == -1 else group_size
    if size < 1 or groups != -(-k // size):
        parts.refuse("scales", f"expected ceil({k} / group_size) rows, got {groups} with group_size {size}")
    zeros = None
    if "qzeros" in parts:
        zeros = _columns(parts.get("qzeros", torch.int32, (groups, n // 8))).t()
    stream = pack_codes(_columns(qweight).t(), 4)
    return LoadedLayer(integer_weight(parts, stream, 4, k, size, scales.t(), zeros), parts.bias(n))


def awq_tensors(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` that :func:`awq` made the weight of."""
    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros
    return {
        "qweight": _words(unsigned_codes(weight, 4).t()),
        "qzeros": _words(zeros.t().to(torch.uint8)),
        "scales": weight.scales.t().contiguous(),
    }


def _words(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`_columns`: uint8 codes [R, N] -> int32 [R, N / 8]."""
    ordered = codes.reshape(codes.shape[0], -1, 8)[:, :, _ORDER].to(torch.int32)
    words = ordered[:, :, 0].clone(memory_format=torch.contiguous_format)
    for j in range(1, 8):
        words |= ordered[:, :, j] << (4 * j)
    return words


def _columns(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N / 8] -> uint8 codes [R, N]."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for j, column in enumerate(_ORDER):
        codes[:, :, column] = (words >> (4 * j)) & 0x0F
    return codes.view(words.shape[0], -1)
