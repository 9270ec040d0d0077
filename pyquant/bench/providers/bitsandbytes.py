"""bitsandbytes: nf4 in blocks of 64, absmax plain and nested."""

from __future__ import annotations

from typing import Any

import torch

from .base import Operand, Provider, Source, import_peer, tensor_bytes

_BLOCKSIZE = 64


class BitsandbytesNf4(Provider):
    """``bitsandbytes.matmul_4bit``."""

    name = "bnb_nf4"
    nested = False

    def build(self, source: Source) -> Operand:
        package = import_peer("bitsandbytes")
        functional = import_peer("bitsandbytes.functional")
        codes, state = functional.quantize_4bit(
            source.w, blocksize=_BLOCKSIZE, quant_type="nf4", compress_statistics=self.nested
        )
        second = [state.state2.absmax, state.offset] if self.nested else []

        def call(weight: tuple[torch.Tensor, Any], x: torch.Tensor) -> torch.Tensor:
            stored, quant_state = weight
            return package.matmul_4bit(x, stored.t(), quant_state=quant_state)

        return Operand(
            (codes, state),
            call,
            tensor_bytes(codes, state.absmax, *second),
            "nf4-nested" if self.nested else "nf4",
            _BLOCKSIZE,
            lambda: functional.dequantize_4bit(codes, state).float(),
        )


class BitsandbytesNf4Nested(BitsandbytesNf4):
    """The same with absmax in 8 bits ("double quantization")."""

    name = "bnb_nf4_nested"
    nested = True
