"""bitsandbytes' live weights without bitsandbytes: its bytes, its ``QuantState`` and its ``Linear4bit``."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

import pyquant
from pyquant import QuantizedWeight
from pyquant.codes import unpack_codes
from pyquant.formats import ScaleType


class QuantState:
    """The attributes of ``bitsandbytes.functional.QuantState``, and its ``as_dict(packed=True)``."""

    def __init__(self, absmax, shape=None, code=None, blocksize=None, quant_type=None, offset=None, state2=None):
        self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize
        self.quant_type, self.offset, self.state2 = quant_type, offset, state2
        self.nested = state2 is not None

    def as_dict(self) -> dict[str, torch.Tensor]:
        settings: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.blocksize}
        settings["shape"] = list(self.shape)
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        if self.nested:
            tensors |= {"nested_absmax": self.state2.absmax, "nested_quant_map": self.state2.code}
            settings |= {"nested_blocksize": self.state2.blocksize, "nested_offset": self.offset.item()}
        blob = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)
        return {**tensors, f"quant_state.bitsandbytes__{self.quant_type}": blob}


def quantize_4bit(
    w: torch.Tensor, quant_type: str = "nf4", blocksize: int = 64, nested: bool = False, storage=torch.uint8
) -> tuple[torch.Tensor, QuantState]:
    """Bytes [*, 1] and quant state of w [N, K], from pyquant's quantizer, which chooses the same codes."""
    return stored_form(pyquant.quantize(w, quant_type, blocksize, nested=nested), storage)


def stored_form(weight: QuantizedWeight, storage: torch.dtype = torch.uint8) -> tuple[torch.Tensor, QuantState]:
    """A canonical weight as bitsandbytes stores it: flat codes, high nibble first."""
    codes = unpack_codes(weight.codes, weight.k, 4).reshape(-1)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % (2 * storage.itemsize)))
    stored = ((codes[::2] << 4) | codes[1::2]).view(storage).view(-1, 1)
    offset = state2 = None
    if weight.scale_type is ScaleType.NESTED:
        offset, map_, absmax = weight.nested_parts()
        state2 = QuantState(absmax, code=map_, blocksize=256)
    shape = torch.Size((weight.n, weight.k))
    name = weight.format.name
    scales = weight.scales.reshape(-1)
    return stored, QuantState(scales, shape, weight.values(), weight.group_size, name, offset, state2)


class Params4bit(nn.Parameter):
    """A frozen parameter that carries its quant state."""

    def __new__(cls, data: torch.Tensor, quant_state: QuantState | None = None) -> Params4bit:
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state = quant_state
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        import copy

        return Params4bit(self.data.clone(), copy.deepcopy(self.quant_state, memo))


class Linear4bit(nn.Linear):
    """The attributes of ``bitsandbytes.nn.Linear4bit``; its forward dequantizes."""

    def __init__(self, k: int, n: int, bias: bool = True, compute_dtype: torch.dtype | None = None, **arguments: Any):
        super().__init__(k, n, bias)
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        stored, state = quantize_4bit(self.weight.detach(), **arguments)
        self.weight = Params4bit(stored, state)
        self.quant_state = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype or x.dtype
        weight = dense(self.weight.data, self.weight.quant_state).to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.weight.quant_state.as_dict().items():
            destination[f"{prefix}weight.{name}"] = tensor


# As the module is recognised without an import of bitsandbytes.
Linear4bit.__module__ = "bitsandbytes.nn.modules"


def dense(stored: torch.Tensor, state: QuantState) -> torch.Tensor:
    """fp32 of ``state.shape``: what the bytes mean, written from bitsandbytes' documents."""
    flat = stored.reshape(-1).view(torch.uint8)
    codes = torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[: state.shape.numel()]
    absmax = state.absmax
    if state.nested:
        levels = state.state2.absmax.repeat_interleave(256)[: absmax.numel()]
        absmax = state.state2.code[absmax.int()] * levels + state.offset
    scales = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes.int()] * scales).view(state.shape)
