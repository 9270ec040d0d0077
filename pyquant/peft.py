"""LoRA of the PEFT package on ``QuantLinear`` (QLoRA). Needs ``peft``; import it as ``pyquant.peft``."""

from __future__ import annotations

import warnings
from typing import Any

import torch

try:
    from peft import LoraConfig, TaskType
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
    from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
    from peft.utils.constants import SEQ_CLS_HEAD_NAMES
except ImportError as error:
    raise ImportError(f"pyquant.peft: expected peft 0.21 or newer ({error}): pip install 'pyquant[train]'") from error
from torch import nn
from transformers.pytorch_utils import Conv1D

from ._replaced_forward import STATE
from .nn import QuantLinear
from .quantize import quantize

# Others begin from the dense weight, and some change it.
_INITS = (True, False, "gaussian", "eva")


def register(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Let ``config`` put LoRA on :class:`pyquant.nn.QuantLinear`; other modules stay PEFT's.

    PEFT does not store this with an adapter: register the config again that an adapter is loaded with.

    Args:
        config: its ``target_modules="all-linear"`` becomes the names of all linear layers of ``model`` but the output
            head. PEFT's own rule knows ``nn.Linear`` and ``Conv1D``, this one also ``QuantLinear``, the experts'
            included, and layers that :func:`pyquant.accelerate` has replaced.
        model: that the adapter is for; needed for "all-linear" only.

    Returns:
        ``config``, for ``get_peft_model(model, register(LoraConfig(...), model))``.

    Raises:
        ValueError: on "all-linear" without a model, or with one that has no linear layer.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        if model is None:
            raise ValueError(
                f"register: target_modules: {targets!r} needs the model: register(config, model); "
                "PEFT alone would skip QuantLinear"
            )
        config.target_modules = _linear_layers(model, config.task_type)
        if not config.target_modules:
            raise ValueError(f"register: model: expected linear layers beside the output head, got {model}")
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def _linear_layers(model: Any, task_type: Any) -> list[str]:
    """Names of linear layers, without heads and what is inside of adapters: PEFT's rule for "all-linear"."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None and task_type == TaskType.SEQ_CLS:
        head = next((h for name in SEQ_CLS_HEAD_NAMES if (h := getattr(model, name, None)) is not None), None)
    heads = set() if head is None else set(head.modules())
    names = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        is_adapter = isinstance(module, BaseTunerLayer)
        if is_adapter:
            inside.update(m for m in module.modules() if m is not module)
        is_linear = isinstance(module, (nn.Linear, Conv1D, QuantLinear)) or STATE in module.__dict__
        is_linear = is_linear or (is_adapter and "Linear" in type(module).__name__)
        if is_linear and module not in inside and module not in heads:
            names.append(name)
    return names


class LoraQuantLinear(LoraLinear):
    """PEFT's LoRA layer around a :class:`pyquant.nn.QuantLinear`, whose weight stays frozen and packed.

    :meth:`merge` quantizes the sum again, in the format of the weight, and warns that this rounds; :meth:`unmerge`
    restores weight and bias bit for bit, for which they are kept as long as an adapter is merged.

    Raises:
        ValueError: on what needs the dense weight (DoRA and other variants, ``init_lora_weights`` that begin from it),
            on ``fan_in_fan_out``, and on layers that tensor parallelism has split.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **arguments: Any) -> None:
        if config.fan_in_fan_out:
            raise ValueError("LoraQuantLinear: fan_in_fan_out: expected False, the weight is [out, in], got True")
        super().__init__(base_layer, adapter_name, config=config, **arguments)
        base = self._base()
        if base.is_parallel:
            raise ValueError(f"LoraQuantLinear: expected a whole layer, got one that is split over ranks: {base}")

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        return {(): None}

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        if config.init_lora_weights not in _INITS:
            expected = ", ".join(map(repr, _INITS))
            got = config.init_lora_weights
            raise ValueError(f"LoraQuantLinear: init_lora_weights: expected one of {expected}, got {got!r}")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, which is quantized again.

        Args:
            safe_merge: without effect: a sum that is not finite is an error in any case.
            adapter_names: None for the active ones.

        Raises:
            ValueError: when the sum has NaN or Inf; the weight is then as before.
        """
        base = self._base()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            warnings.warn(f"LoraQuantLinear: merge rounds the sum to {base.weight.format.name} again", stacklevel=2)
            before = base.weight, None if base.bias is None else base.bias.detach().clone()
            w = base.weight.unpack()
            delta = self.get_delta_weight(adapter).detach()
            if base.permutation is not None:
                delta = delta[:, base.permutation]
            merged = quantize(
                w.dequantize() + delta.float(),
                w.format.name,
                w.group_size,
                codebook=w.codebook,
                scale_type=w.scale_type,
                zero_type=w.zero_type,
            )
            if self.lora_bias[adapter]:
                if base.bias is None:
                    raise ValueError("LoraQuantLinear: merge: lora_bias needs a layer with a bias, got none")
                bias = self.lora_B[adapter].get_parameter("bias").detach() * self.scaling[adapter]
                base.bias.data += bias.to(base.bias.dtype)
            base._set_weight(merged.pack())
            if not self.merged_adapters:
                self._before = before
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Undo all merges, bit for bit."""
        if not self.merged_adapters:
            warnings.warn("LoraQuantLinear: unmerge: nothing is merged", stacklevel=2)
            return
        base, (weight, bias) = self._base(), self._before
        base._set_weight(weight)
        if base.bias is not None and bias is not None:
            base.bias.data.copy_(bias)
        self.merged_adapters.clear()
        del self._before

    def _base(self) -> QuantLinear:
        base = self.get_base_layer()
        assert isinstance(base, QuantLinear)
        return base

    # What PEFT asks of a layer's weight tensor.

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        base = self._base()
        return base.in_features, base.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, None]:
        return self._base().weight.device, None
