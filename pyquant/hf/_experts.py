"""Fused experts of transformers 5 (``[experts, N, K]`` in one parameter), as one quantized layer for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..nn import QuantLinear
from ._grouped_gemm import grouped_gemm


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
    # Choices sorted by expert, so that an expert's rows stand together: shapes that do not depend on the data.
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    x = hidden_states[order // top_k_index.shape[1]]
    # On the CPU, where the loop is: the one wait for the GPU. "No expert", in expert parallelism, has a higher number.
    counts = (expert[:, None] == torch.arange(len(up), device=expert.device)).sum(0).cpu()
    y = _add_bias(self, up_name, expert, _each_expert(up, x, counts))
    y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
    y = _add_bias(self, "down_proj", expert, _each_expert(down, y, counts))
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    # Back in the order of the choices, to be added in that order: atomic additions would come in any.
    y = torch.empty_like(y).index_copy(0, order, y).view(*top_k_index.shape, -1)
    return (y * top_k_weights[..., None]).sum(1).to(hidden_states.dtype)


def _each_expert(layers: Any, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The first ``counts[0]`` rows of x through the first layer, the next through the second; zeros behind them."""
    if torch.compiler.is_compiling():
        columns = list(zip(*(layer if isinstance(layer, StackedLinear) else (layer,) for layer in layers), strict=True))
        if all(type(layer) is QuantLinear for column in columns for layer in column):
            return torch.cat([grouped_gemm(x, counts, column) for column in columns], dim=-1)
    sizes = counts.tolist()
    rows = x.split([*sizes, len(x) - sum(sizes)])
    y = [layers[e](rows[e]) for e, size in enumerate(sizes) if size]
    n = y[0].shape[-1] if y else layers[0](rows[0]).shape[-1]
    return torch.cat([*y, x.new_zeros(len(rows[-1]), n)])


def _add_bias(module: Any, name: str, expert: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if not module.has_bias:
        return y
    bias = getattr(module, f"{name}_bias")
    return y + bias[expert.clamp(max=len(bias) - 1)]
