"""HQQ: codes with float zeros, grouped along the rows of the reshaped weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..codes import pack_codes
from ..formats import FORMATS, ZeroType
from ..weight import QuantizedWeight
from ._integers import scale_type_of
from ._layer import FLOATS, LoadedLayer, Parts

# packing: (dtype of the codes, bits, codes in an element, shift of the first part of the rows)
_PACKINGS = {
    "4bit_u8": (torch.uint8, 4, 2, 4),
    "3bit_32": (torch.int32, 3, 10, 27),
    "2bit_u8": (torch.uint8, 2, 4, 6),
    "1bit_u8": (torch.uint8, 1, 8, 7),
}


def hqq(tensors: Mapping[str, torch.Tensor], prefix: str) -> LoadedLayer:
    """An ``HQQLinear`` with axis 1 in 1 to 4 bits, as ``uint4`` with float zeros; fewer bits are widened to 4.

    ``dequantize`` is ``(code - zero) * scale`` in fp32, rounded once. HQQ computes in its compute dtype: in fp32 the
    result is the same; in fp16 and bf16 HQQ rounds the difference as well, which this does not.

    Args:
        tensors: HQQ's state dict: ``<prefix>.W_q`` uint8 (3 bits: int32; ``view_as_float``: a float dtype),
            ``.scale`` and ``.zero`` [N * K / group_size, 1], ``.shape``, ``.axis``, ``.packing``, ``.group_size`` as
            tensors or Python values, ``.bias`` [N].
        prefix: the layer's name.

    Raises:
        LoadError: a tensor is missing, damaged, or does not fit the others; axis 0; 5 bits or more; groups that cross
            row ends.
    """
    parts = Parts("hqq", tensors, prefix)
    n, k = _shape(parts)
    if parts.value("axis") != 1:
        parts.refuse(
            "axis",
            f"expected 1, got {parts.value('axis')!r}: axis 0 groups run across output channels, "
            "and a kernel that reads a row needs K scales for it; quantize again with axis=1",
        )
    packing = parts.value("packing")
    if packing not in _PACKINGS:
        parts.refuse("packing", f"expected {' or '.join(_PACKINGS)}, got {packing!r}")
    group_size = parts.value("group_size")
    size = k if group_size is None else group_size
    if not isinstance(size, int) or size < 1 or k % size:
        parts.refuse("group_size", f"expected a divisor of K={k}, so that no group crosses rows, got {group_size!r}")
    rows = n * k // size
    scales = parts.finite("scale", FLOATS, (rows, 1))
    zeros = parts.finite("zero", FLOATS, (rows, 1))
    if scales.dtype != zeros.dtype:
        scales, zeros = scales.float(), zeros.float()
    codes = pack_codes(_codes(parts, str(packing), rows, size).view(n, k), 4)
    weight = QuantizedWeight(
        FORMATS["uint4"],
        n,
        k,
        size,
        scale_type_of(scales),
        ZeroType.FLOAT,
        codes,
        scales.view(n, -1),
        zeros.view(n, -1),
    )
    return LoadedLayer(parts.checked(weight), parts.bias(n))


def _shape(parts: Parts) -> tuple[int, int]:
    if "shape" not in parts:
        parts.refuse("shape", "expected [N, K], got none")
    stored = parts.raw("shape")
    shape = stored.reshape(-1).tolist() if isinstance(stored, torch.Tensor) else list(stored)
    if len(shape) != 2 or min(shape) < 1:
        parts.refuse("shape", f"expected [N, K], got {shape}")
    return int(shape[0]), int(shape[1])


def pack_hqq_codes(codes: torch.Tensor, packing: str) -> torch.Tensor:
    """uint8 [rows, columns] -> HQQ's elements [ceil(rows / count), columns]; the inverse of what :func:`hqq` reads."""
    dtype, bits, count, first = _PACKINGS[packing]
    height = -(-codes.shape[0] // count)
    padded = torch.nn.functional.pad(codes, (0, 0, 0, count * height - codes.shape[0])).to(torch.int32)
    packed = torch.zeros(height, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i, part in enumerate(padded.view(count, height, -1)):
        packed |= part << (first - i * bits)
    return packed.to(dtype)


def _codes(parts: Parts, packing: str, rows: int, columns: int) -> torch.Tensor:
    """uint8 [rows, columns]: part i of the rows stands at shift ``first - i * bits`` of the elements."""
    dtype, bits, count, first = _PACKINGS[packing]
    stored = parts.get("W_q", (dtype, *FLOATS))
    packed = stored.view(dtype)
    height = -(-rows // count)
    if packed.numel() != height * columns or (count * height != rows and packing != "3bit_32"):
        parts.refuse("W_q", f"expected [{height}, {columns}] {packing} elements, got {list(packed.shape)}")
    packed = packed.reshape(height, columns)
    return torch.cat([((packed >> (first - i * bits)) & ((1 << bits) - 1)).to(torch.uint8) for i in range(count)])[
        :rows
    ].contiguous()
