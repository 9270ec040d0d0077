"""Whether a decoder with quantized layers says what one with the dequantized weights says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...nn import QuantLinear
from ..gpu import ERROR_BUDGET
from ..rows import INCORRECT, PASSED
from .accelerated import dequantized_by_bitsandbytes, packed_of
from .decoder import Decoder

_PROMPT = 8


class _Dequantized(nn.Module):
    """The same layer by ``F.linear`` on its dequantized weight, made anew in every call, since those of a whole model
    may not fit. ``dtype``: of the weight and the product; y is rounded to x's."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.dtype), self._weight()).to(x.dtype)

    def _weight(self) -> torch.Tensor:
        if isinstance(self.layer, QuantLinear):
            return self.layer.weight.dequantize(self.dtype)
        return dequantized_by_bitsandbytes(self.layer, self.dtype)


@torch.inference_mode()
def check_logits(decoder: Decoder, batch: int, device: str) -> tuple[str, float]:
    """``passed`` or ``incorrect``, and the error of the logits: of a prompt of 8 tokens, and of a token behind it.

    The reference has the dequantized weights in fp32 and rounds the products of its linear layers to bf16. With weights
    rounded to bf16 as well the logits have an error; the decoder's may be 1.5 times that. The weights of accelerated
    modules are dequantized by bitsandbytes, so that reading them wrongly is an error as well.
    """
    decoder.use_compiled(False)
    layers = {name: m for name, m in decoder.named_modules() if isinstance(m, QuantLinear) or packed_of(m) is not None}

    def logits_with(dtype: torch.dtype) -> torch.Tensor:
        for name, module in layers.items():
            decoder.set_submodule(name, _Dequantized(module, dtype))
        return _logits(decoder, batch, device)

    ours = _logits(decoder, batch, device)
    try:
        reference, base = logits_with(torch.float32), logits_with(torch.bfloat16)
    finally:
        for name, module in layers.items():
            decoder.set_submodule(name, module)
    error, allowed = ((t - reference).norm() / reference.norm() for t in (ours, base))
    # NaN is not below any budget.
    return PASSED if bool(error <= ERROR_BUDGET * allowed) else INCORRECT, round(error.item(), 6)


def _logits(decoder: Decoder, batch: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(batch)
    ids = torch.randint(decoder.config.vocab, (batch, _PROMPT + 1), device=device, generator=generator)
    cache = decoder.cache(batch, _PROMPT + 8)
    return torch.stack([decoder(ids[:, :_PROMPT], cache), decoder(ids[:, _PROMPT:], cache)]).float()
