"""GemLite: Triton kernels, tuned at run time where its own table has no entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .base import (
    PEER_SPEC,
    Operand,
    Provider,
    Source,
    import_peer,
    peer_reference,
    peer_weight,
    require,
    tensor_bytes,
    unsigned_codes,
)


class Gemlite(Provider):
    """``A16W4_HQQ_INT``."""

    name = "gemlite"
    slow = True
    _table_loaded = False

    def build(self, source: Source) -> Operand:
        package = import_peer("gemlite")
        helper = import_peer("gemlite.helper")
        require(source.dtype in (torch.float16, torch.bfloat16), "its activations are fp16 or bf16")
        weight = peer_weight(source)
        self._load_table(package)
        codes = unsigned_codes(weight)
        one_a_byte = torch.stack([codes & 15, codes >> 4], dim=-1).view(source.n, source.k)
        scales = weight.scales.reshape(-1, 1)
        processor = helper.A16W4_HQQ_INT(device="cuda", dtype=source.dtype)
        layer = processor.from_weights(one_a_byte, scales.clone(), torch.full_like(scales, 8))

        def call(module: Any, x: torch.Tensor) -> torch.Tensor:
            return module(x)

        nbytes = tensor_bytes(layer.W_q, layer.scales, layer.zeros)
        return Operand(layer, call, nbytes, str(PEER_SPEC), weight.group_size, peer_reference(source))

    @classmethod
    def _load_table(cls, package: Any) -> None:
        """GemLite's own tuning results for Hopper, if it brings them."""
        table = Path(package.__file__).parent / "configs" / "h100.json"
        if not cls._table_loaded and torch.cuda.get_device_capability() == (9, 0) and table.is_file():
            package.GemLiteLinear.load_config(str(table))
        cls._table_loaded = True
