"""humming: kernels compiled at run time for each shape."""

from __future__ import annotations

from typing import Any

import torch

from .base import PEER_SPEC, Operand, Provider, Source, import_peer, require


class Humming(Provider):
    """``HummingLayer`` on uint4 weights, which it quantizes itself."""

    name = "humming"
    slow = True

    def build(self, source: Source) -> Operand:
        layers = import_peer("humming.layer")
        require(source.dtype in (torch.float16, torch.bfloat16), "its activations are fp16 or bf16")
        group = PEER_SPEC.group_size
        require(source.k % (group or 1) == 0, f"K must be a multiple of the group size {group}")
        layer = layers.HummingLayer(
            shape_n=source.n,
            shape_k=source.k,
            weight_config={"dtype": "uint4", "group_size": group},
            torch_dtype=source.dtype,
        ).cuda()
        layer.load_from_unquantized(source.w)
        layer.transform()

        def call(module: Any, x: torch.Tensor) -> torch.Tensor:
            return module(x)

        nbytes = sum(p.nbytes for p in layer.parameters())
        return Operand(layer, call, nbytes, "uint4-g128", group)
