"""A decoder layer that can be compiled and left as it is, by turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class LayerRunner(nn.Module):
    """Stands in a decoder for its layer, and runs it on this layer's part of the key and value cache.

    The layer sees no index of its own, so that one compilation serves all layers ("regional compilation"): the
    whole of a decoder would take many times as long to compile.
    """

    def __init__(self, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.layer = layer
        self.index = index
        self._compiled: Callable[..., torch.Tensor] | None = None

    def forward(self, hidden: torch.Tensor, past_key_values: Any = None, **arguments: Any) -> torch.Tensor:
        run = self._compiled or self.layer
        return run(hidden, past_key_values=past_key_values.parts[self.index], **arguments)

    def use_compiled(self, wanted: bool) -> None:
        """Compiles in the next call, with shapes that may change from the second one on."""
        self._compiled = torch.compile(self.layer.forward) if wanted else None
