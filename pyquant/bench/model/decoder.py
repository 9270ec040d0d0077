"""What a measurement needs of a decoder, whoever's code it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import nn

from ...profiler.models import Config
from .layer_runner import LayerRunner


class Decoder(nn.Module):
    """A model whose layers are :class:`LayerRunner` modules and whose last layer is called ``lm_head``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def cache(self, batch: int, length: int) -> Any:
        """Static, for up to ``length`` tokens of each sequence, with ``reset()``."""

    @abstractmethod
    def forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Logits [batch, vocab] of the last of ``ids`` [batch, tokens], which follow what the cache holds."""

    def use_compiled(self, wanted: bool) -> None:
        """Whether each layer runs compiled."""
        for module in self.modules():
            if isinstance(module, LayerRunner):
                module.use_compiled(wanted)

    def head(self) -> nn.Module:
        """lm_head."""
        return next(module for name, module in self.named_modules() if is_head(name))


def is_head(name: str) -> bool:
    """Whether a module of this name is lm_head."""
    return name.split(".")[-1] == "lm_head"
