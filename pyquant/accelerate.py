"""``pyquant.accelerate``: a model of bitsandbytes, HQQ, GPTQ or AWQ, run by pyquant's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import _gptq_linear, _hqq_linear, _linear4bit
from ._gptq_linear import GptqLinearPatch
from ._hqq_linear import HqqLinearPatch
from ._linear4bit import Linear4bitPatch
from ._packed_hqq import PackedHqq
from ._packed_parameter import PackedParameter
from .load import LoadError

_Patch = Linear4bitPatch | HqqLinearPatch | GptqLinearPatch


@dataclass(frozen=True)
class _Kind:
    """Modules that are replaced: root packages and classes, the parameter that they may share, and by what."""

    classes: tuple[tuple[str, str], ...]
    weight: str | None
    reason_not_to: Callable[[Any], str | None]
    pack: Callable[[Any, str], Any]
    patch: type[_Patch]


_KINDS = (
    _Kind(
        (("bitsandbytes", "Linear4bit"),), "weight",
        _linear4bit.reason_not_to, lambda m, name: PackedParameter(m._parameters["weight"], name), Linear4bitPatch,
    ),
    _Kind((("hqq", "HQQLinear"),), "W_q", _hqq_linear.reason_not_to, PackedHqq, HqqLinearPatch),
    _Kind(_gptq_linear.CLASSES, None, _gptq_linear.reason_not_to, _gptq_linear.pack, GptqLinearPatch),
)  # fmt: skip
# Root package and class of quantized layers that are reported, not replaced; the first one that fits.
_OTHERS = {
    ("bitsandbytes", "Linear8bitLt"): "LLM.int8() quantizes activations; there is no kernel for it",
    ("bitsandbytes", "Embedding4bit"): "an embedding is a look-up, no GEMM",
    ("pyquant", "QuantLinear"): "it runs on pyquant's kernels already",
    ("gptqmodel", "AWQuantLinear"): _gptq_linear.AWQ_REARRANGED,
    ("gptqmodel", "*QuantLinear"): _gptq_linear.REARRANGED,
    ("awq", "WQLinear*"): _gptq_linear.AWQ_REARRANGED,
}
_CONVERT = "if that is of a quantized checkpoint, `pyquant convert` it and load that after `import pyquant.hf`"
_PLAIN = "not quantized; pyquant.quantize_model quantizes it"


@dataclass(eq=False)
class Acceleration:
    """What :func:`accelerate` did to a model, and how to undo it.

    Attributes:
        replaced: module name -> a description of its packed weight.
        kept: name of a linear or quantized module that runs as before -> the reason.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    _patches: list[_Patch] = field(default_factory=list)

    def free_original(self) -> None:
        """Free the original bytes, which the packed weights hold as well: bitsandbytes' ``weight`` and
        ``weight.quant_state.absmax``, HQQ's ``W_q``, ``scale`` and ``zero``, ``qweight``, ``qzeros`` and ``scales`` of
        GPTQ and AWQ."""
        for patch in self._patches:
            patch.packed.free()

    def restore_original(self) -> None:
        """Make them again, bit for bit."""
        for patch in self._patches:
            patch.packed.restore()

    def undo(self) -> None:
        """Restore the original bytes and let the modules run as before; without effect when done twice."""
        while self._patches:
            self._patches.pop().remove()
        self.replaced.clear()

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} modules replaced, {len(self.kept)} kept"]
        lines += [f"  replaced {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def accelerate(
    model: nn.Module, *, free_original: bool = False, compute_dtype: torch.dtype | None = None
) -> Acceleration:
    """Run quantized layers of bitsandbytes (``Linear4bit``), HQQ, GPTQ and AWQ by pyquant's kernels, in place.

    Modules keep their class, parameters, buffers, ``state_dict``, ``weight.quant_state`` and ``meta``; their
    ``forward`` is replaced.
    Weights are packed once, losslessly; a weight that is changed in place, replaced or moved is packed again at the
    next call. Gradients flow to the inputs and to the bias; no dequantized weight is kept for them.

    Args:
        model: any module that holds ``bitsandbytes.nn.Linear4bit``, ``hqq.core.quantize.HQQLinear``, or layers of
            gptqmodel, auto_gptq or awq whose kernel runs on the checkpoint's tensors, also inside PEFT's layers.
        free_original: free the original bytes of each weight as soon as it is packed. ``state_dict`` and moves of the
            model restore them for as long as they need them; ``Acceleration.restore_original`` restores them for good.
        compute_dtype: of the GEMMs, in place of the modules' ``compute_dtype`` (GPTQ and AWQ: the input's): fp32, fp16
            or bf16.

    Returns:
        what was replaced, what was not and why; ``undo()`` takes everything back.

    Raises:
        TypeError: when ``compute_dtype`` is none of the three.
        ValueError: when there is nothing to replace; the message says why for each linear module.
    """
    if compute_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"accelerate: compute_dtype: expected float32, float16 or bfloat16, got {compute_dtype}")
    done = Acceleration()
    # The modules that share a weight, by the weight, or by the module where they do not.
    groups: dict[Any, tuple[_Kind, dict[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        kind = next((k for k in _KINDS if any(_is_kind(module, *names) for names in k.classes)), None)
        reason = _reason_of_other(module) if kind is None else kind.reason_not_to(module)
        if reason is not None:
            done.kept[name] = reason
        elif kind is not None:
            weight = module if kind.weight is None else module._parameters[kind.weight]
            groups.setdefault(weight, (kind, {}))[1][name] = module
    try:
        for kind, modules in groups.values():
            name, module = next(iter(modules.items()))
            try:
                packed = kind.pack(module, name)
            except LoadError as error:
                done.kept.update(dict.fromkeys(modules, str(error)))
                continue
            done._patches += [kind.patch(m, packed, compute_dtype) for m in modules.values()]
            done.replaced.update(dict.fromkeys(modules, repr(packed.weight)))
            if free_original:
                packed.free()
    except BaseException:
        done.undo()
        raise
    if not done.replaced:
        reasons = "".join(f"\n  {name or type(model).__name__}: {reason}" for name, reason in done.kept.items())
        raise ValueError(
            "accelerate: found no Linear4bit of bitsandbytes, HQQLinear or layer of GPTQ or AWQ that could be replaced"
            + reasons
        )
    return done


def _is_kind(module: nn.Module, package: str, name: str) -> bool:
    return any(_is(c, package, name) for c in type(module).__mro__)


def _is(cls: type, package: str, name: str) -> bool:
    """By name: the packages need not be installed."""
    if cls.__module__.split(".")[0] != package:
        return False
    if name.startswith("*"):
        return cls.__name__.endswith(name[1:])
    return cls.__name__.startswith(name[:-1]) if name.endswith("*") else cls.__name__ == name


def _reason_of_other(module: nn.Module) -> str | None:
    for (package, name), reason in _OTHERS.items():
        if _is_kind(module, package, name):
            return reason
    if type(module) is not nn.Linear:
        return None
    weight = module._parameters.get("weight")
    if type(weight) is nn.Parameter:
        return _PLAIN
    if weight is None:  # compressed-tensors
        names = ", ".join(
            name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None
        )
        return f"it has no weight but {names or 'nothing'}; {_CONVERT}"
    return f"its weight is a {type(weight).__name__}; {_CONVERT}"  # torchao
