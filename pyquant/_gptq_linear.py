"""The replaced ``forward`` of GPTQ layers, which keep their class and their buffers."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._packed_gptq import PackedGptq
from ._replaced_forward import STATE, ReplacedForward, State, packed_linear, reason_of_forward
from .nn import permute

# Kernels that run on the checkpoint's tensors, by root package and class; the second and the last two of gptqmodel's
# rearrange them in their first forward pass. gptqmodel's add nothing to stored zero points: it adds one when it loads a
# checkpoint of version 1. Its `qzero_format()` does not tell, it says 1 for a checkpoint of version 2.
CLASSES = (
    ("gptqmodel", "TorchLinear"),
    ("gptqmodel", "TorchAtenLinear"),
    ("gptqmodel", "TorchFusedLinear"),
    ("gptqmodel", "TritonV2Linear"),
    # Their names in older versions.
    ("gptqmodel", "TorchQuantLinear"),
    ("gptqmodel", "TorchFusedQuantLinear"),
    ("gptqmodel", "TritonV2QuantLinear"),
    ("auto_gptq", "QuantLinear"),
)
_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
REARRANGED = (
    "its kernel rearranges its tensors; load the model with "
    'quantization_config=GPTQConfig(bits=4, backend="gptq_torch") of transformers, or `pyquant convert` the checkpoint '
    "and load that after `import pyquant.hf`"
)
# Of auto_gptq, whose classes have one name: QUANT_TYPE, and whether the kernel reads g_idx.
_AUTO_GPTQ = {"cuda": True, "triton": True, "tritonv2": True, "cuda-old": False}


class GptqLinearPatch:
    """One module with its ``forward`` replaced, from construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, packed: PackedGptq, compute_dtype: torch.dtype | None) -> None:
        self._module = module
        self.packed = packed
        self._forward = ReplacedForward(module, _forward)
        setattr(module, STATE, State(packed, compute_dtype))
        module._apply = MethodType(_apply, module)  # type: ignore[method-assign]
        self._hooks = (
            module.register_state_dict_post_hook(_complete_state_dict),
            module.register_load_state_dict_pre_hook(_before_loading),
            module.register_load_state_dict_post_hook(_after_loading),
        )

    def remove(self) -> None:
        """Restore the original bytes and the module's own methods."""
        module = self._module
        self.packed.restore()
        delattr(module, STATE)
        del module._apply
        for hook in self._hooks:
            hook.remove()
        self._forward.remove()


def pack(module: Any, name: str) -> PackedGptq:
    """The packed form of a module that :func:`reason_not_to` has nothing against."""
    if _package(module) == "auto_gptq":
        return PackedGptq(module, name, "gptq", _AUTO_GPTQ[module.QUANT_TYPE])
    return PackedGptq(module, name, "gptq_v2", has_order=True)


def reason_not_to(module: Any) -> str | None:
    """Why a GPTQ layer cannot be replaced; None where it can."""
    if STATE in module.__dict__:
        return "accelerated already"
    if _package(module) == "auto_gptq" and getattr(module, "QUANT_TYPE", None) not in _AUTO_GPTQ:
        return REARRANGED
    tensors = [module._buffers.get(name) for name in _TENSORS]
    if any(t is None or t.is_meta for t in tensors):
        return "it holds no weight yet"
    if getattr(module, "planar", False):
        return f"{module.bits} bits in the planar layout (gptq_p), for which there is no loader"
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return "it rotates its input"
    if getattr(module, "adapter", None) is not None:
        return "it has an adapter of gptqmodel"
    qweight = tensors[0]
    if qweight.dtype != torch.int32 or qweight.shape[0] * 32 != _in_features(module) * module.bits:
        return (
            f"qweight: expected int32 of {_in_features(module)} inputs with {module.bits} bits, got {qweight.dtype} "
            f"{list(qweight.shape)}: padded, or rearranged by its kernel; accelerate before the first forward pass, "
            'or load the model with GPTQConfig(bits=4, backend="gptq_torch")'
        )
    return reason_of_forward(module, _own(module))


def _own(module: nn.Module) -> Any:
    """The class of the kernel."""
    return next(c for c in type(module).__mro__ if (c.__module__.split(".")[0], c.__name__) in CLASSES)


def _package(module: nn.Module) -> str:
    package: str = _own(module).__module__.split(".")[0]
    return package


def _in_features(module: Any) -> int:
    features: int = module.infeatures if hasattr(module, "infeatures") else module.in_features
    return features


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    state: State | None = self.__dict__.get(STATE)
    if state is None:
        return type(self).forward(self, x)
    packed: PackedGptq = state.packed
    if not torch.compiler.is_compiling() and not packed.is_current:
        packed.pack()
    if packed.permutation is not None:
        x = permute(x, packed.permutation)
    return packed_linear(x, packed, self._buffers.get("bias"), state.compute_dtype or x.dtype)


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to()``: on the original bytes, then packed where they are."""
    packed: PackedGptq = getattr(self, STATE).packed
    packed.thaw()
    type(self)._apply(self, fn, recurse)
    packed.settle()
    return self


def _complete_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the original bytes in, where they are freed."""
    packed: PackedGptq = getattr(module, STATE).packed
    if packed.freed:
        state.update({prefix + name: tensor for name, tensor in packed.original().items()})


def _before_loading(module: nn.Module, *_: Any) -> None:
    getattr(module, STATE).packed.thaw()


def _after_loading(module: nn.Module, _: Any) -> None:
    getattr(module, STATE).packed.settle()
