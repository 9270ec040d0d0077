"""Which model code runs, and a decoder with random weights."""

from __future__ import annotations

import torch
from torch import nn

from ...profiler.models import Config
from ..providers import Unavailable
from .decoder import Decoder
from .plain import PlainDecoder
from .transformers_llama import TransformersDecoder, require_transformers

MODEL_CODES = ("transformers", "plain")
PLAIN = "plain"
_STD = 0.02  # of weights, as Llama's initializer_range


def choose_code(asked: str | None) -> tuple[str, str]:
    """The column ``model_code``, such as ``transformers 5.23.0`` or ``plain``, and why it is not transformers' ("").

    Raises:
        Unavailable: transformers was asked for and cannot be used.
    """
    if asked == PLAIN:
        return PLAIN, ""
    try:
        return f"transformers {require_transformers().__version__}", ""
    except Unavailable as error:
        if asked:
            raise
        return PLAIN, str(error)


def build(code: str, config: Config, device: str) -> Decoder:
    """A decoder in bf16 on ``device``, the same weights each time."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            decoder: Decoder = (PlainDecoder if code == PLAIN else TransformersDecoder)(config)
    finally:
        torch.set_default_dtype(before)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=_STD)
    decoder.eval().requires_grad_(False)
    return decoder
