"""GPTQ: ``qweight``, ``qzeros``, ``scales``, ``g_idx``; checkpoint formats ``gptq`` (v1) and ``gptq_v2``."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..codes import pack_codes, unpack_codes
from ._integers import integer_weight, stream_to_words, unsigned_codes, words_to_stream
from ._layer import FLOATS, LoadedLayer, Parts

# What is added to a stored zero point.
_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_BITS = (2, 3, 4, 8)


def gptq(
    tensors: Mapping[str, torch.Tensor],
    prefix: str,
    *,
    bits: int = 4,
    group_size: int | None = None,
    checkpoint_format: str = "gptq",
) -> LoadedLayer:
    """A GPTQ layer, symmetric or not, with or without act-order.

    ``dequantize`` is ``(code - zero) * scale``: the difference is exact, so one rounding in any dtype, as GPTQ's own in
    fp16. Symmetric weights become ``int4`` or ``int8``; others ``uint4`` with integer zeros. 2 and 3 bits are widened
    to 4. Act-order sorts K by group; :attr:`LoadedLayer.permutation` says how.

    Args:
        tensors: a state dict: ``<prefix>.qweight`` int32 [K * bits / 32, N], ``.qzeros`` int32 [groups, N * bits / 32],
            ``.scales`` [groups, N] in fp16, bf16 or fp32, ``.g_idx`` int32 [K] (may be missing), ``.bias`` [N].
        prefix: the layer's name.
        bits: 2, 3, 4 or 8; ``bits`` of the ``quantization_config``.
        group_size: its ``group_size``; -1 for K; None to derive it from the shapes.
        checkpoint_format: "gptq", where stored zeros are one too low, or "gptq_v2". A stored v1 zero of ``2^bits - 1``
            means ``2^bits``.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others, or 8 bits are not symmetric.
    """
    parts = Parts("gptq", tensors, prefix)
    if checkpoint_format not in _ZERO_OFFSETS:
        parts.refuse("checkpoint_format", f"expected {' or '.join(_ZERO_OFFSETS)}, got {checkpoint_format!r}")
    if bits not in _BITS:
        parts.refuse("bits", f"expected 2, 3, 4 or 8, got {bits!r}")
    qweight = parts.get("qweight", torch.int32, (None, None))
    words, n = qweight.shape
    if words == 0 or n == 0 or words * 32 % bits or n * bits % 32:
        parts.refuse("qweight", f"expected [K * {bits} / 32, N] with N * {bits} % 32 == 0, got {list(qweight.shape)}")
    k = words * 32 // bits
    scales = parts.finite("scales", FLOATS, (None, n))
    groups = scales.shape[0]
    g_idx = parts.get("g_idx", (torch.int32, torch.int64), (k,)).long() if "g_idx" in parts else None
    group_size = _group_size(parts, group_size, k, groups, g_idx)
    qzeros = parts.get("qzeros", torch.int32, (groups, n * bits // 32))
    zeros = unpack_codes(words_to_stream(qzeros, n, bits), n, bits).short() + _ZERO_OFFSETS[checkpoint_format]
    if bits == 8 and not bool((zeros == 128).all()):
        parts.refuse("qzeros", "8-bit codes with zero points: expected symmetric codes, or at most 4 bits")
    stream = words_to_stream(qweight.t(), k, bits)

    permutation = None if g_idx is None else _permutation(parts, g_idx, group_size, groups)
    if permutation is not None:
        stream = pack_codes(unpack_codes(stream, k, bits)[:, permutation], bits)
    weight = integer_weight(parts, stream, bits, k, group_size, scales.t(), zeros.to(torch.uint8).t())
    return LoadedLayer(weight, parts.bias(n), permutation)


def gptq_tensors(layer: LoadedLayer, bits: int, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """``qweight``, ``qzeros`` and ``scales`` that :func:`gptq` made the layer of."""
    weight = layer.weight
    codes = unsigned_codes(weight, bits)
    if layer.permutation is not None:
        sorted_codes, codes = codes, torch.empty_like(codes)
        codes[:, layer.permutation] = sorted_codes
    zeros = torch.full_like(weight.scales, 1 << (bits - 1)) if weight.zeros is None else weight.zeros
    stored_zeros = zeros.t().to(torch.uint8) - _ZERO_OFFSETS[checkpoint_format]
    return {
        "qweight": stream_to_words(pack_codes(codes, bits)).t().contiguous(),
        "qzeros": stream_to_words(pack_codes(stored_zeros.contiguous(), bits)),
        "scales": weight.scales.t().contiguous(),
    }


def _group_size(parts: Parts, group_size: int | None, k: int, groups: int, g_idx: torch.Tensor | None) -> int:
    if group_size is None:
        group_size = k if groups == 1 else -(-k // groups)
    elif group_size == -1:
        group_size = k
    if group_size >= 1 and groups > -(-k // group_size) and g_idx is not None and bool((g_idx.diff() < 0).any()):
        parts.refuse(
            "g_idx",
            f"act-order with split K: {k} inputs that take their scales from {groups} groups of {group_size}; "
            "convert the whole checkpoint, and split it along N",
        )
    if group_size < 1 or groups != -(-k // group_size):
        parts.refuse("scales", f"expected ceil({k} / group_size) rows, got {groups} with group_size {group_size}")
    return group_size


def _permutation(parts: Parts, g_idx: torch.Tensor, group_size: int, groups: int) -> torch.Tensor | None:
    """The order of k that sorts groups; None where they are sorted."""
    natural = torch.arange(len(g_idx), device=g_idx.device) // group_size
    if torch.equal(g_idx, natural):
        return None
    ordered, permutation = torch.sort(g_idx, stable=True)
    if not torch.equal(ordered, natural):
        parts.refuse("g_idx", f"expected {group_size} inputs in each of {groups} groups, got other counts")
    return permutation
