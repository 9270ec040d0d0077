"""The replaced ``forward`` of GPTQ and AWQ layers, which keep their class and their buffers."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ._packed_words import FREED, PackedAwq, PackedGptq
from ._replaced_forward import STATE, ReplacedForward, State, packed_linear, reason_of_forward


def _gptqmodel(module: Any, name: str) -> PackedGptq:
    # Its kernels add nothing to stored zero points: it adds one when it loads a checkpoint of version 1. Its
    # `qzero_format()` does not tell, it says 1 for a checkpoint of version 2.
    return PackedGptq(module, name, "gptq_v2", has_order=True)


def _auto_gptq(module: Any, name: str) -> PackedGptq:
    return PackedGptq(module, name, "gptq", _AUTO_GPTQ[module.QUANT_TYPE])


# Kernels that run on the checkpoint's tensors, by root package and class; TorchAten* and TorchFused* rearrange them in
# their first forward pass.
_KERNELS: dict[tuple[str, str], Callable[[Any, str], PackedGptq | PackedAwq]] = {
    ("gptqmodel", "TorchLinear"): _gptqmodel,
    ("gptqmodel", "TorchAtenLinear"): _gptqmodel,
    ("gptqmodel", "TorchFusedLinear"): _gptqmodel,
    ("gptqmodel", "TritonV2Linear"): _gptqmodel,
    # Their names in older versions.
    ("gptqmodel", "TorchQuantLinear"): _gptqmodel,
    ("gptqmodel", "TorchFusedQuantLinear"): _gptqmodel,
    ("gptqmodel", "TritonV2QuantLinear"): _gptqmodel,
    ("auto_gptq", "QuantLinear"): _auto_gptq,
    ("gptqmodel", "AwqTorchLinear"): PackedAwq,
    ("gptqmodel", "AwqGEMMLinear"): PackedAwq,
    ("gptqmodel", "AwqGEMMTritonLinear"): PackedAwq,
    ("awq", "WQLinear_GEMM"): PackedAwq,
}
CLASSES = tuple(_KERNELS)
# Of auto_gptq, whose classes have one name: QUANT_TYPE, and whether the kernel reads g_idx.
_AUTO_GPTQ = {"cuda": True, "triton": True, "tritonv2": True, "cuda-old": False}
_CONVERT = "or `pyquant convert` the checkpoint and load that after `import pyquant.hf`"
REARRANGED = (
    "its kernel rearranges its tensors; load the model with "
    f'quantization_config=GPTQConfig(bits=4, backend="gptq_torch") of transformers, {_CONVERT}'
)
AWQ_REARRANGED = (
    "its kernel rearranges its tensors; load the model with "
    f'quantization_config=AwqConfig(bits=4, backend="torch_awq") of transformers, {_CONVERT}'
)


class GptqLinearPatch:
    """One module with its ``forward`` replaced, from construction until :meth:`remove`."""

    def __init__(self, module: nn.Module, packed: PackedGptq | PackedAwq, compute_dtype: torch.dtype | None) -> None:
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


def pack(module: Any, name: str) -> PackedGptq | PackedAwq:
    """The packed form of a module that :func:`reason_not_to` has nothing against."""
    return _KERNELS[_key(_own(module))](module, name)


def reason_not_to(module: Any) -> str | None:
    """Why a layer cannot be replaced; None where it can."""
    if STATE in module.__dict__:
        return "accelerated already"
    own = _own(module)
    make = _KERNELS[_key(own)]
    if make is _auto_gptq and getattr(module, "QUANT_TYPE", None) not in _AUTO_GPTQ:
        return REARRANGED
    names = FREED if make is PackedAwq else (*FREED, "g_idx")
    tensors = [module._buffers.get(name) for name in names]
    if any(t is None or t.is_meta for t in tensors):
        return "it holds no weight yet"
    bits = module.w_bit if hasattr(module, "w_bit") else module.bits
    if getattr(module, "planar", False):
        return f"{bits} bits in the planar layout (gptq_p), for which there is no loader"
    if make is PackedAwq and bits != 4:
        return f"AWQ in {bits} bits, for which there is no loader"
    if getattr(module, "online_full_had", False) or getattr(module, "online_partial_had", False):
        return "it rotates its input"
    if getattr(module, "adapter", None) is not None:
        return "it has an adapter of gptqmodel"
    k = module.infeatures if hasattr(module, "infeatures") else module.in_features
    rows = k if make is PackedAwq else k * bits / 32
    if tensors[0].dtype != torch.int32 or tensors[0].shape[0] != rows:
        return (
            f"qweight: expected int32 words of {k} inputs with {bits} bits, got {tensors[0].dtype} "
            f"{list(tensors[0].shape)}: padded, or rearranged by its kernel; accelerate before the first forward pass, "
            'or load the model with the backend "gptq_torch"'
        )
    return reason_of_forward(module, own)


def _own(module: nn.Module) -> Any:
    """The class of the kernel."""
    return next(c for c in type(module).__mro__ if _key(c) in _KERNELS)


def _key(cls: type) -> tuple[str, str]:
    return cls.__module__.split(".")[0], cls.__name__


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    state: State | None = self.__dict__.get(STATE)
    if state is None:
        return type(self).forward(self, x)
    packed: PackedGptq | PackedAwq = state.packed
    if not torch.compiler.is_compiling() and not packed.is_current:
        packed.pack()
    dtype = state.compute_dtype or x.dtype
    return packed_linear(self, x, packed, self._buffers.get("bias"), dtype, packed.permutation)


def _apply(self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply``, behind ``.to()``: on the original bytes, then packed where they are."""
    packed: PackedGptq | PackedAwq = getattr(self, STATE).packed
    packed.thaw()
    type(self)._apply(self, fn, recurse)
    packed.settle()
    return self


def _complete_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the original bytes in, where they are freed."""
    packed: PackedGptq | PackedAwq = getattr(module, STATE).packed
    if packed.freed:
        state.update({prefix + name: tensor for name, tensor in packed.original().items()})


def _before_loading(module: nn.Module, *_: Any) -> None:
    getattr(module, STATE).packed.thaw()


def _after_loading(module: nn.Module, _: Any) -> None:
    getattr(module, STATE).packed.settle()
