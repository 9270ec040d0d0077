"""transformers' own Llama, with random weights and a static cache."""

from __future__ import annotations

from typing import Any

import torch

from ...profiler.models import Config
from ..providers import Unavailable
from ..providers.base import import_peer, require
from .decoder import Decoder
from .layer_runner import LayerRunner
from .plain import NORM_EPS, ROPE_BASE

_OLDEST = 5  # its static cache counts positions on the device, so that a step can be a CUDA graph


class TransformersDecoder(Decoder):
    """``LlamaForCausalLM``; projections on their own, as its checkpoints have them.

    Raises:
        Unavailable: when transformers is not installed, or older than 5.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        package = require_transformers()
        sizes = package.LlamaConfig(
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads // config.head_dim,
            num_key_value_heads=config.kv_heads // config.head_dim,
            head_dim=config.head_dim,
            vocab_size=config.vocab,
            rms_norm_eps=NORM_EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        )
        self.model = package.LlamaForCausalLM._from_config(sizes, dtype=torch.get_default_dtype())
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.layer_idx = 0  # of the one part that LayerRunner gives it
            self.model.model.layers[i] = LayerRunner(layer, i)

    def cache(self, batch: int, length: int) -> Any:
        # Its tensors are made by the first tokens that it gets.
        caches = import_peer("transformers.cache_utils")
        cache = caches.StaticCache(config=self.model.config, max_cache_len=length)
        cache.parts = [caches.Cache(layers=[layer]) for layer in cache.layers]
        cache.slots = torch.arange(length, device=self.model.device)
        return cache

    def forward(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        # With positions and mask given: to make the mask of a prompt itself, it waits for the GPU.
        positions = cache.get_seq_length() + cache.slots[: ids.shape[1]]
        mask = (cache.slots <= positions[:, None])[None, None]
        output = self.model(
            ids,
            attention_mask=mask,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def require_transformers() -> Any:
    """The package.

    Raises:
        Unavailable: when it is not installed, or older than 5.
    """
    package = import_peer("transformers")
    major = int(package.__version__.split(".")[0])
    require(major >= _OLDEST, f"transformers {package.__version__} is older than {_OLDEST}")
    try:
        package.LlamaForCausalLM  # noqa: B018  loads it
    except Exception as error:  # its lazy imports raise all kinds of things
        raise Unavailable(f"transformers' Llama does not load: {error}") from error
    return package
