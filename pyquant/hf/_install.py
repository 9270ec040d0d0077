"""Quantized layers take the place of transformers' parameters while these are loaded, and give it back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..load import LoadedLayer
from ..nn import QuantLinear
from ..weight import PackedWeight
from ._experts import set_experts, unset_experts
from ._targets import Target

# Some models initialize the `weight` of a submodule's submodule after loading, unless it is marked as loaded.
PackedWeight._is_hf_initialized = True  # type: ignore[attr-defined]


def install(model: nn.Module, target: Target, layers: Sequence[Sequence[LoadedLayer]]) -> None:
    """Put layers where the parameter of ``target`` is.

    Args:
        model: whose other parameters may still be on the meta device.
        target: its parameter is replaced.
        layers: of each expert, the layers whose outputs stand side by side; of a linear layer, one of one.
    """
    module = model.get_submodule(target.module)
    if target.experts is not None:
        set_experts(module, target.name.rpartition(".")[2], [[_loading(part) for part in parts] for parts in layers])
        module._is_hf_initialized = True  # type: ignore[assignment]
        return
    layer = _loading(layers[0][0])
    # The very parameter: transformers notes on it whether it is loaded, which may come later.
    layer._parameters["bias"] = module._parameters["bias"]
    model.set_submodule(target.module, layer.train(module.training))


def uninstall(model: nn.Module, target: Target, dtype: torch.dtype) -> None:
    """Put the dequantized weight back."""
    weights = []
    for name in target.layer_names():
        layers = quantized_layers(model.get_submodule(name)).values()
        w = torch.cat([LoadedLayer(m.weight.unpack(), None, m.permutation).dequantize(dtype) for m in layers])
        weights.append(w.T.contiguous() if target.transposed else w)
    if target.experts is not None:
        unset_experts(model.get_submodule(target.module), target.name.rpartition(".")[2], torch.stack(weights))
        return
    old = model.get_submodule(target.module)
    assert isinstance(old, QuantLinear)
    with torch.device("meta"):
        new = Conv1D(target.n, target.k) if target.transposed else nn.Linear(target.k, target.n)
    new.weight = nn.Parameter(weights[0])
    bias = old._parameters["bias"]
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(dtype)))
    model.set_submodule(target.module, new.train(old.training))


def finish(model: nn.Module) -> None:
    """Undo what :func:`install` did for the time of loading."""
    for layer in quantized_layers(model).values():
        layer._non_persistent_buffers_set.update(name for name in layer._buffers if name.startswith("_"))
        bias: torch.Tensor | None = layer._parameters["bias"]
        if bias is not None and not getattr(bias, "_is_hf_initialized", False):
            # The checkpoint has none, and transformers knows how to initialize those of its own modules only.
            nn.init.zeros_(bias)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """All quantized layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _loading(layer: LoadedLayer) -> QuantLinear:
    """A packed layer, in a state that outlives the rest of transformers' loading."""
    module = QuantLinear.from_quantized(layer.weight, None, layer.permutation)
    # transformers replaces buffers that are not persistent by empty ones when all is loaded, to be initialized.
    module._non_persistent_buffers_set.clear()
    module._is_hf_initialized = True  # type: ignore[assignment]
    return module
