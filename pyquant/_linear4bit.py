"""The replaced ``forward`` of bitsandbytes' ``Linear4bit``, which keeps its class and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._packed_parameter import PackedParameter
from ._replaced_forward import STATE, ReplacedForward, State, packed_linear, reason_of_forward


class Linear4bitPatch:
    """One module with its ``forward`` replaced, from construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, packed: PackedParameter, compute_dtype: torch.dtype | None) -> None:
        self._module = module
        self._forward = ReplacedForward(module, _forward)
        setattr(module, STATE, State(packed, compute_dtype))
        module._apply = MethodType(_apply, module)  # type: ignore[method-assign]
        self._hook = module.register_state_dict_post_hook(_complete_state_dict)

    @property
    def packed(self) -> PackedParameter:
        """The packed weight in use."""
        return getattr(self._module, STATE).packed

    def remove(self) -> None:
        """Restore the original bytes and the module's own ``forward``."""
        module = self._module
        self.packed.restore()
        delattr(module, STATE)
        del module._apply
        self._hook.remove()
        self._forward.remove()


def reason_not_to(module: nn.Module) -> str | None:
    """Why a ``Linear4bit`` cannot be replaced; None where it can."""
    if STATE in module.__dict__:
        return "accelerated already"
    weight = module._parameters.get("weight")
    if weight is None or getattr(weight, "quant_state", None) is None:
        return "its weight has no quant_state: it is quantized when the model moves to a device"
    if weight.is_meta or not weight.numel():
        return "its weight has no data"
    own: Any = next(c for c in type(module).__mro__ if c.__name__ == "Linear4bit")
    return reason_of_forward(module, own)


def _forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    state: State | None = self.__dict__.get(STATE)
    if state is None:
        return type(self).forward(self, x)
    packed = state.packed
    weight = self._parameters["weight"]
    if weight is not packed.parameter or (
        not torch.compiler.is_compiling() and packed.version is not None and packed.counter._version != packed.version
    ):
        packed = _pack_again(self)
    dtype: torch.dtype = state.compute_dtype or self.compute_dtype or x.dtype  # type: ignore[assignment]
    return packed_linear(self, x, packed, self._parameters["bias"], dtype)


def _pack_again(module: nn.Module) -> PackedParameter:
    """After the weight was changed in place, or replaced as PEFT does when it merges."""
    state: State = getattr(module, STATE)
    packed, weight = state.packed, module._parameters["weight"]
    assert weight is not None
    if packed.parameter is not weight:
        state.packed = PackedParameter(weight, packed.name)
    elif not packed.freed:
        packed.pack()
    return state.packed


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to()``: on the original bytes, then packed where they are."""
    before = getattr(self, STATE).packed
    freed = before.freed
    before.restore()
    type(self)._apply(self, fn, recurse)
    if self._parameters["weight"] is not before.parameter or not before.is_current:
        _pack_again(self)
    if freed:
        getattr(self, STATE).packed.free()
    return self


def _complete_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the original bytes in, where they are freed."""
    packed: PackedParameter = getattr(module, STATE).packed
    if packed.freed:
        state[prefix + "weight"], state[prefix + "weight.absmax"] = packed.original()
