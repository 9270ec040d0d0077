"""The replaced ``forward`` of bitsandbytes' ``Linear4bit``, which keeps its class and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._packed_parameter import PackedParameter
from .ops import gemm

_STATE = "_pyquant"


class State:
    """What a replaced module carries as ``module._pyquant``."""

    def __init__(self, packed: PackedParameter, compute_dtype: torch.dtype | None) -> None:
        self.packed = packed
        self.compute_dtype = compute_dtype


class Linear4bitPatch:
    """One module with its ``forward`` replaced, from construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, packed: PackedParameter, compute_dtype: torch.dtype | None) -> None:
        self._module = module
        # A hook of Hugging Face's accelerate stands as `forward`, and calls `_old_forward`.
        self._slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        self._before = module.__dict__.get(self._slot)
        self._forward = MethodType(_forward, module)
        setattr(module, _STATE, State(packed, compute_dtype))
        setattr(module, self._slot, self._forward)
        module._apply = MethodType(_apply, module)  # type: ignore[method-assign]
        self._hook = module.register_state_dict_post_hook(_complete_state_dict)

    @property
    def packed(self) -> PackedParameter:
        """The packed weight in use."""
        return getattr(self._module, _STATE).packed

    def remove(self) -> None:
        """Restore the original bytes and the module's own ``forward``."""
        module = self._module
        self.packed.restore()
        delattr(module, _STATE)
        del module._apply
        self._hook.remove()
        # Where a wrapper took the method over since, it stays, and without a state it calls the module's own.
        if module.__dict__.get(self._slot) is self._forward:
            delattr(module, self._slot)
            if self._before is not None:
                setattr(module, self._slot, self._before)


def reason_not_to(module: nn.Module) -> str | None:
    """Why a ``Linear4bit`` cannot be replaced; None where it can."""
    if _STATE in module.__dict__:
        return "accelerated already"
    weight = module._parameters.get("weight")
    if weight is None or getattr(weight, "quant_state", None) is None:
        return "its weight has no quant_state: it is quantized when the model moves to a device"
    if weight.is_meta or not weight.numel():
        return "its weight has no data"
    own: Any = next(c for c in type(module).__mro__ if c.__name__ == "Linear4bit")
    if type(module).forward is not own.forward:
        return f"{type(module).__name__} has a forward of its own"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "its weight is offloaded"
    inner = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if inner is not None and getattr(inner, "__func__", None) is not own.forward:
        return "its forward is replaced by another library"
    return None


def _forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    state: State | None = self.__dict__.get(_STATE)
    if state is None:
        return type(self).forward(self, x)
    packed = state.packed
    weight = self._parameters["weight"]
    if weight is not packed.parameter or (
        not torch.compiler.is_compiling() and packed.version is not None and packed.counter._version != packed.version
    ):
        packed = _pack_again(self)
    dtype: torch.dtype = state.compute_dtype or self.compute_dtype or x.dtype  # type: ignore[assignment]
    bias: torch.Tensor | None = self._parameters["bias"]
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if dtype == x.dtype:
        return gemm(x, packed.tensors, bias, packed.integers)
    return gemm(x.to(dtype), packed.tensors, bias, packed.integers).to(x.dtype)


def _pack_again(module: nn.Module) -> PackedParameter:
    """After the weight was changed in place, or replaced as PEFT does when it merges."""
    state: State = getattr(module, _STATE)
    packed, weight = state.packed, module._parameters["weight"]
    assert weight is not None
    if packed.parameter is not weight:
        state.packed = PackedParameter(weight, packed.name)
    elif not packed.freed:
        packed.pack()
    return state.packed


def _apply(self: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to()``: on the original bytes, then packed where they are."""
    before = getattr(self, _STATE).packed
    freed = before.freed
    before.restore()
    type(self)._apply(self, fn, recurse)
    if self._parameters["weight"] is not before.parameter or not before.is_current:
        _pack_again(self)
    if freed:
        getattr(self, _STATE).packed.free()
    return self


def _complete_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the original bytes in, where they are freed."""
    packed: PackedParameter = getattr(module, _STATE).packed
    if packed.freed:
        state[prefix + "weight"], state[prefix + "weight.absmax"] = packed.original()
