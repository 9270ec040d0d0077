"""``pyquant.accelerate``: a model that bitsandbytes has loaded, run by pyquant's kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ._linear4bit import Linear4bitPatch, reason_not_to
from ._packed_parameter import PackedParameter
from .load import LoadError

# Root package and class of quantized layers that are reported, not replaced.
_OTHERS = {
    ("bitsandbytes", "Linear8bitLt"): "LLM.int8() quantizes activations; there is no kernel for it",
    ("bitsandbytes", "Embedding4bit"): "an embedding is a look-up, no GEMM",
    ("hqq", "HQQLinear"): "HQQ modules are not replaced; read their state_dict with pyquant.load.hqq",
    ("gptqmodel", "*QuantLinear"): "GPTQ modules are not replaced; read their state_dict with pyquant.load.gptq",
    ("auto_gptq", "*QuantLinear"): "GPTQ modules are not replaced; read their state_dict with pyquant.load.gptq",
    ("awq", "WQLinear*"): "AWQ modules are not replaced; read their state_dict with pyquant.load.awq",
}
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
    _patches: list[Linear4bitPatch] = field(default_factory=list)

    def free_original(self) -> None:
        """Free the bytes of ``weight`` and ``weight.quant_state.absmax``, which the packed weights hold as well."""
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
    """Run the bitsandbytes ``Linear4bit`` modules of ``model`` by pyquant's kernels, in place.

    Modules keep their class, parameters, ``state_dict`` and ``weight.quant_state``; their ``forward`` is replaced.
    Weights are packed once, losslessly; a weight that is changed in place, replaced or moved is packed again at the
    next call. Gradients flow to the inputs and to the bias; no dequantized weight is kept for them.

    Args:
        model: any module that holds ``bitsandbytes.nn.Linear4bit``, also inside PEFT's layers.
        free_original: free the original bytes of each weight as soon as it is packed. ``state_dict`` and moves of the
            model restore them for as long as they need them; ``Acceleration.restore_original`` restores them for good.
        compute_dtype: of the GEMMs, in place of the modules' ``compute_dtype``: fp32, fp16 or bf16.

    Returns:
        what was replaced, what was not and why; ``undo()`` takes everything back.

    Raises:
        TypeError: when ``compute_dtype`` is none of the three.
        ValueError: when there is nothing to replace; the message says why for each linear module.
    """
    if compute_dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"accelerate: compute_dtype: expected float32, float16 or bfloat16, got {compute_dtype}")
    done = Acceleration()
    groups: dict[nn.Parameter, dict[str, nn.Module]] = {}  # the modules that share a weight
    for name, module in model.named_modules():
        reason = reason_not_to(module) if _is_linear4bit(module) else _reason_of_other(module)
        if reason is not None:
            done.kept[name] = reason
        elif _is_linear4bit(module):
            groups.setdefault(module._parameters["weight"], {})[name] = module
    try:
        for parameter, modules in groups.items():
            try:
                packed = PackedParameter(parameter, next(iter(modules)))
            except LoadError as error:
                done.kept.update(dict.fromkeys(modules, str(error)))
                continue
            done._patches += [Linear4bitPatch(module, packed, compute_dtype) for module in modules.values()]
            done.replaced.update(dict.fromkeys(modules, repr(packed.weight)))
            if free_original:
                packed.free()
    except BaseException:
        done.undo()
        raise
    if not done.replaced:
        reasons = "".join(f"\n  {name or type(model).__name__}: {reason}" for name, reason in done.kept.items())
        raise ValueError(f"accelerate: found no bitsandbytes Linear4bit that could be replaced{reasons}")
    return done


def _is_linear4bit(module: nn.Module) -> bool:
    return any(_is(c, "bitsandbytes", "Linear4bit") for c in type(module).__mro__)


def _is(cls: type, package: str, name: str) -> bool:
    """By name: the packages need not be installed."""
    if cls.__module__.split(".")[0] != package:
        return False
    if name.startswith("*"):
        return cls.__name__.endswith(name[1:])
    return cls.__name__.startswith(name[:-1]) if name.endswith("*") else cls.__name__ == name


def _reason_of_other(module: nn.Module) -> str | None:
    for (package, name), reason in _OTHERS.items():
        if any(_is(c, package, name) for c in type(module).__mro__):
            return reason
    return _PLAIN if type(module) is nn.Linear else None
