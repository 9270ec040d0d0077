"""The replaced ``forward`` of HQQ's ``HQQLinear``, which keeps its class, ``W_q`` and ``meta``."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._packed_hqq import PackedHqq
from ._replaced_forward import STATE, ReplacedForward, State, packed_linear, reason_of_forward

# Methods that read or move the module's own tensors.
_METHODS = ("_apply", "cuda", "state_dict")


class HqqLinearPatch:
    """One module with its ``forward`` replaced, from construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, packed: PackedHqq, compute_dtype: torch.dtype | None) -> None:
        self._module = module
        self.packed = packed
        self._forward = ReplacedForward(module, _forward)
        setattr(module, STATE, State(packed, compute_dtype))
        methods: tuple[Callable[..., Any], ...] = (_apply, _cuda, _state_dict)
        for name, function in zip(_METHODS, methods, strict=True):
            module.__dict__[name] = MethodType(function, module)

    def remove(self) -> None:
        """Restore the original bytes and the module's own methods."""
        module = self._module
        self.packed.restore()
        delattr(module, STATE)
        for name in _METHODS:
            del module.__dict__[name]
        self._forward.remove()


def reason_not_to(module: Any) -> str | None:
    """Why an ``HQQLinear`` cannot be replaced; None where it can."""
    if STATE in module.__dict__:
        return "accelerated already"
    if module.W_q is None or not module.meta or module.W_q.is_meta:
        return "it holds no weight yet"
    if "zero_scale" in module.meta:
        return "its scales and zeros are offloaded (offload_meta)"
    own: Any = next(c for c in type(module).__mro__ if c.__name__ == "HQQLinear")
    return reason_of_forward(module, own)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    state: State | None = self.__dict__.get(STATE)
    if state is None:
        return type(self).forward(self, x)
    packed: PackedHqq = state.packed
    if not torch.compiler.is_compiling() and not packed.is_current:
        packed.pack()
    return packed_linear(self, x, packed, self.bias, state.compute_dtype or self.compute_dtype)


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to()`` of the model. It moves ``W_q`` only, and ``cuda`` must move the rest."""
    packed: PackedHqq = getattr(self, STATE).packed
    packed.thaw()
    type(self)._apply(self, fn, recurse)
    if self.W_q.device == self.meta["scale"].device:
        packed.settle()
    return self


def _cuda(self: Any, device: Any) -> nn.Module:
    """HQQ's own way to move a module, to any device."""
    packed: PackedHqq = getattr(self, STATE).packed
    packed.thaw()
    type(self).cuda(self, device)
    packed.settle()
    return self


def _state_dict(self: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """With the original bytes, where they are freed."""
    packed: PackedHqq = getattr(self, STATE).packed
    freed = packed.freed
    packed.thaw()
    state: dict[str, Any] = type(self).state_dict(self, *arguments, **keywords)
    if freed:
        # The parameter itself is in there, and is emptied again.
        for mapping, name in ((state, "W_q"), (keywords.get("destination"), keywords.get("prefix", "") + "W_q")):
            if mapping is not None and name in mapping:
                mapping[name] = mapping[name].detach()
        packed.free()
    return state
