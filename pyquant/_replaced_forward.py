"""A module's ``forward`` replaced by one that runs a packed weight; the class and all else stay."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._module_path import prefix_path
from .nn import permute
from .ops import gemm

STATE = "_pyquant"


class State:
    """What a replaced module carries as ``module._pyquant``."""

    def __init__(self, packed: Any, compute_dtype: torch.dtype | None) -> None:
        self.packed = packed
        self.compute_dtype = compute_dtype


class ReplacedForward:
    """From construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, function: Callable[..., torch.Tensor]) -> None:
        self._module = module
        # A hook of Hugging Face's accelerate stands as `forward`, and calls `_old_forward`.
        self._slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        self._before = module.__dict__.get(self._slot)
        self._forward = MethodType(function, module)
        setattr(module, self._slot, self._forward)

    def remove(self) -> None:
        """The module's own ``forward`` again."""
        module = self._module
        # Where a wrapper took the method over since, it stays, and without a state it calls the module's own.
        if module.__dict__.get(self._slot) is self._forward:
            delattr(module, self._slot)
            if self._before is not None:
                setattr(module, self._slot, self._before)


def reason_of_forward(module: nn.Module, own: Any) -> str | None:
    """Why the ``forward`` of a module of class ``own`` or a subclass cannot be replaced; None where it can."""
    if type(module).forward is not own.forward:
        return f"{type(module).__name__} has a forward of its own"
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "its weight is offloaded"
    inner = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    if inner is not None and getattr(inner, "__func__", None) is not own.forward:
        return "its forward is replaced by another library"
    return None


def packed_linear(
    module: nn.Module,
    x: torch.Tensor,
    packed: Any,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    permutation: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x[..., permutation] @ weight^T + bias`` computed in ``dtype``, in x's dtype; errors name ``module``."""
    try:
        if permutation is not None:
            x = permute(x, permutation)
        if bias is not None and bias.dtype != dtype:
            bias = bias.to(dtype)
        if dtype == x.dtype:
            return gemm(x, *packed.tensors, bias, *packed.integers)
        return gemm(x.to(dtype), *packed.tensors, bias, *packed.integers).to(x.dtype)
    except RuntimeError as error:
        prefix_path(error, module)
        raise
