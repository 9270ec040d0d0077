"""LoRA by hand, on any frozen linear layer, and what a step of it keeps for the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from pyquant.nn import QuantLinear


class LoRA(nn.Module):
    """``base(x) + B A x``, with A and B in fp32 and the base frozen."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.randn(base.out_features, rank) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(x, self.a.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, self.b.to(x.dtype))


def add_lora(model: nn.Module) -> nn.Module:
    """LoRA around every ``QuantLinear``; all else frozen."""
    names = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert names
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoRA(model.get_submodule(name)))
    return model


def dense_twin(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy in which every ``QuantLinear`` is a frozen ``nn.Linear`` of its dequantized weight."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight.data = module.weight.dequantize()
            if module.bias is not None:
                dense.bias.data = module.bias.detach().clone()
            twin.set_submodule(name, dense.requires_grad_(False))
    return twin.to(dtype)


def trainable_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the parameters that train, all of which must have one."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all(g is not None for g in gradients.values())
    return gradients


def kept_for_backward(model: nn.Module, call: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    """What ``call`` saves for the backward pass, beside the model's own parameters and buffers; each memory once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y.requires_grad
    return list(kept.values())
