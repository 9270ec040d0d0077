"""bitsandbytes' live weights, a tensor of bytes beside a ``QuantState``, as canonical weights and back."""

from __future__ import annotations

import json
from typing import Any

import torch

from .codes import unpack_codes
from .load import LoadError, bitsandbytes
from .weight import QuantizedWeight


def weight_of_quant_state(stored: torch.Tensor, quant_state: Any, prefix: str = "") -> QuantizedWeight:
    """The canonical weight, of ``quant_state.shape``.

    Args:
        stored: the packed codes, in any shape and any ``quant_storage`` dtype.
        quant_state: with the attributes of ``bitsandbytes.functional.QuantState``.
        prefix: the layer's name, for errors.

    Raises:
        LoadError: as :func:`pyquant.load.bitsandbytes`.
    """
    q = quant_state
    own = prefix + ".weight" if prefix else "weight"
    if getattr(q, "packing_format_for_cpu", False):
        raise LoadError(
            f"{own}: bitsandbytes has rearranged it for its CPU kernel and rounded its scales; "
            "reload the model and convert it before its first forward"
        )
    tensors = {own: stored, own + ".absmax": q.absmax, own + ".quant_map": q.code}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
            got = "one on the meta device" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise LoadError(f"{name}: expected a tensor with data, got {got}")
    settings: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "shape": None if q.shape is None else [int(size) for size in q.shape],
    }
    nested = q.state2
    if nested is not None:
        tensors |= {own + ".nested_absmax": nested.absmax, own + ".nested_quant_map": nested.code}
        settings |= {
            "nested_blocksize": nested.blocksize,
            "nested_offset": None if q.offset is None else float(q.offset),
        }
    blob = json.dumps(settings).encode()
    tensors[f"{own}.quant_state.bitsandbytes__{q.quant_type}"] = torch.tensor(list(blob), dtype=torch.uint8)
    return bitsandbytes(tensors, prefix).weight


def stored_codes(weight: QuantizedWeight) -> torch.Tensor:
    """uint8 [ceil(N * K / 2)]: the codes as bitsandbytes stores them, row-major, high nibble first."""
    if weight.k % 2 == 0:
        flat = weight.codes.reshape(-1)
        return (flat >> 4) | (flat << 4)
    codes = torch.nn.functional.pad(unpack_codes(weight.codes, weight.k, 4).reshape(-1), (0, weight.n % 2))
    return (codes[::2] << 4) | codes[1::2]
