"""A Llama decoder in plain torch. Projections that share their input are joined, as inference servers have them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...profiler.models import Config
from .decoder import Decoder
from .layer_runner import LayerRunner

NORM_EPS = 1e-5
ROPE_BASE = 500_000.0


@dataclass
class LayerCache:
    """Keys and values of one layer, [batch, kv heads, length, head_dim], filled up to a position that all layers
    share."""

    keys: torch.Tensor
    values: torch.Tensor


class PlainCache:
    """Static: the whole length is attended to, under a mask."""

    def __init__(self, config: Config, batch: int, length: int, like: torch.Tensor) -> None:
        shape = (batch, config.kv_heads // config.head_dim, length, config.head_dim)
        self.parts = [LayerCache(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(config.layers)]
        self.position = torch.zeros((), dtype=torch.int64, device=like.device)
        self.slots = torch.arange(length, device=like.device)

    def reset(self) -> None:
        self.position.zero_()


class _Layer(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.head_dim
        self.sizes = (c.heads, c.kv_heads, c.kv_heads)
        self.input_norm = nn.RMSNorm(c.hidden, eps=NORM_EPS)
        self.qkv = nn.Linear(c.hidden, c.heads + 2 * c.kv_heads, bias=False)
        self.out = nn.Linear(c.heads, c.hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(c.hidden, eps=NORM_EPS)
        self.gate_up = nn.Linear(c.hidden, 2 * c.intermediate, bias=False)
        self.down = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(
        self,
        hidden: torch.Tensor,
        past_key_values: LayerCache,
        positions: torch.Tensor,
        mask: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        joined = self.qkv(self.input_norm(hidden)).split(self.sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in joined)
        keys, values = past_key_values.keys, past_key_values.values
        keys.index_copy_(2, positions, _rotate(k, *rotary))
        values.index_copy_(2, positions, v)
        # Query heads that share keys become rows of one attention, so that keys and values are not copied for each.
        kv_heads, tokens = keys.shape[1], q.shape[2]
        q = _rotate(q, *rotary).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.unflatten(2, (-1, tokens)).flatten(1, 2)
        hidden = hidden + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)


def _rotate(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = t.shape[-1] // 2
    return t * cos + torch.cat((-t[..., half:], t[..., :half]), -1) * sin


class PlainDecoder(Decoder):
    """Weights as modules of ``nn`` make them."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList(LayerRunner(_Layer(config), i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=NORM_EPS)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def cache(self, batch: int, length: int) -> PlainCache:
        return PlainCache(self.config, batch, length, self.embed.weight)

    def forward(self, ids: torch.Tensor, cache: PlainCache) -> torch.Tensor:
        positions = cache.position + cache.slots[: ids.shape[1]]
        hidden = self.embed(ids)
        # Added to scores; a row for each token of each query head that shares keys, as the layers lay them out.
        seen = (cache.slots <= positions[:, None]).repeat(self.config.heads // self.config.kv_heads, 1)
        mask = torch.zeros_like(seen, dtype=hidden.dtype).masked_fill_(~seen, float("-inf"))
        rotary = self._rotary(positions, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, past_key_values=cache, positions=positions, mask=mask, rotary=rotary)
        cache.position += ids.shape[1]
        return self.lm_head(self.norm(hidden[:, -1]))

    def _rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        exponents = torch.arange(0, self.config.head_dim, 2, device=positions.device) / self.config.head_dim
        angles = positions[:, None] / ROPE_BASE**exponents
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
