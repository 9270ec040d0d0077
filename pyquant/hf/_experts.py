"""Fused experts of transformers 5 (``[experts, N, K]`` in one parameter), as one quantized layer for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear


class StackedLinear(nn.ModuleList):
    """Layers whose outputs stand side by side: gate and up of an expert that a checkpoint keeps apart."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self], dim=-1)


def fused_weights(module: nn.Module) -> list[str]:
    """Names of a module's fused expert weights; empty if it is no module of transformers' ``ExpertsInterface``."""
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return []
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    found = [getattr(module, name, None) for name in names]
    return list(names) if all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in found) else []


def set_experts(module: nn.Module, name: str, experts: Sequence[Sequence[QuantLinear]]) -> None:
    """Replace the parameter ``name`` by the layers of each expert, and ``forward`` by a loop over experts."""
    del module._parameters[name]
    layers = [parts[0] if len(parts) == 1 else StackedLinear(parts) for parts in experts]
    setattr(module, name, nn.ModuleList(layers))
    module.forward = MethodType(_forward, module)


def unset_experts(module: nn.Module, name: str, weight: torch.Tensor) -> None:
    """The inverse: ``weight`` [experts, ..] becomes the parameter again."""
    delattr(module, name)
    setattr(module, name, nn.Parameter(weight))
    module.__dict__.pop("forward", None)


def _forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [tokens, hidden], expert of each choice [tokens, k], its weight [tokens, k] -> [tokens, hidden]."""
    up_name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down = getattr(self, up_name), self.down_proj
    out = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= len(up):  # "no expert", in expert parallelism
            continue
        token, choice = torch.where(top_k_index == expert)
        y = _add_bias(self, up_name, expert, up[expert](hidden_states[token]))
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = _add_bias(self, "down_proj", expert, down[expert](y))
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        y = y * top_k_weights[token, choice, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def _add_bias(module: Any, name: str, expert: int, y: torch.Tensor) -> torch.Tensor:
    return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y
