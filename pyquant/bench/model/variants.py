"""Whose linear layers a decoder has: nobody's (bf16), pyquant's in one format, or another library's, as they are or
accelerated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ...nn import QuantLinear, quantize_model
from ..format_spec import FormatSpec, parse_format_spec
from ..providers import PEERS, Provider, Source
from ..providers.base import import_peer, tensor_bytes
from .accelerated import packed_of
from .decoder import Decoder, is_head

BF16 = "bf16"
BITSANDBYTES = ("bnb_nf4", "bnb_nf4_nested")
ACCELERATED = tuple(f"{name}-accelerated" for name in BITSANDBYTES)
_PROVIDERS: dict[str, type[Provider]] = {peer.name: peer for peer in PEERS if peer.name not in BITSANDBYTES}
DEFAULT = (BF16, BITSANDBYTES[0], ACCELERATED[0], "marlin", "machete", "humming", "nf4", "int4-g128")
NAMES = (BF16, *BITSANDBYTES, *ACCELERATED, *_PROVIDERS)


@dataclass(frozen=True)
class Variant:
    """``name`` is bf16, a peer's, or a format of pyquant's as :class:`FormatSpec` writes it."""

    name: str
    spec: FormatSpec | None = None  # pyquant's format

    @property
    def label(self) -> str:
        return f"pyquant {self.name}" if self.spec else self.name

    @property
    def accelerated(self) -> bool:
        """Whether ``pyquant.accelerate`` runs on the decoder behind :meth:`apply`."""
        return self.name in ACCELERATED

    @property
    def ours(self) -> bool:
        """Whether pyquant's kernels run it."""
        return self.accelerated or self.spec is not None

    def apply(self, decoder: Decoder) -> None:
        """Replace the linear layers of ``decoder``, all but lm_head.

        Raises:
            Unavailable: the library is not installed, or does not take these layers.
            ValueError: pyquant does not take them.
        """
        if self.name == BF16:
            return
        if self.spec:
            spec = self.spec
            quantize_model(decoder, spec.name, exclude=["*lm_head"], group_size=spec.group_size, nested=spec.nested)
            return
        for name, module in linears_of(decoder).items():
            decoder.set_submodule(name, self._peer_layer(module))

    def _peer_layer(self, module: nn.Module) -> nn.Module:
        w: Any = module.weight
        if self.name in (*BITSANDBYTES, *ACCELERATED):
            return _bitsandbytes_layer(w, nested=self.name in (BITSANDBYTES[1], ACCELERATED[1]))
        return PeerLinear(_PROVIDERS[self.name](), w)


def parse_variant(text: str) -> Variant:
    """A name of :data:`NAMES`, or a format.

    Raises:
        ValueError: naming what was expected.
    """
    if text in NAMES:
        return Variant(text)
    try:
        return Variant(text, parse_format_spec(text))
    except ValueError as error:
        raise ValueError(f"expected one of {', '.join(NAMES)}, or a format: {error}") from error


class PeerLinear(nn.Module):
    """A linear layer that a provider of the benchmark computes. Its operators take x as a matrix."""

    def __init__(self, provider: Provider, w: torch.Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = w.shape
        operand = provider.build(Source(self.out_features, self.in_features, w.dtype, w=w))
        self.operand = replace(operand, reference=None)  # which would keep w alive

    # Operators of a library that is loaded without its Python part have no fake kernels, and kernels that are made at
    # run time are not for a tracer: torch.compile takes what stands around the layer.
    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.operand.call(self.operand.weight, x.reshape(-1, self.in_features))
        return y.reshape(*x.shape[:-1], self.out_features)


def _bitsandbytes_layer(w: torch.Tensor, nested: bool) -> nn.Module:
    """``Linear4bit``, as transformers makes it of a model that it loads in 4 bits; nf4, blocks of 64."""
    modules = import_peer("bitsandbytes").nn
    n, k = w.shape
    layer = modules.Linear4bit(
        k, n, bias=False, compute_dtype=w.dtype, quant_type="nf4", compress_statistics=nested, device="meta"
    )
    layer.weight = modules.Params4bit(
        w.data, requires_grad=False, quant_type="nf4", compress_statistics=nested, module=layer
    )
    return layer.to(w.device)  # quantizes


def linears_of(decoder: Decoder) -> dict[str, nn.Module]:
    """The layers that variants replace, of whatever variant they are, by name: all linear ones but lm_head."""
    found = (nn.Linear, QuantLinear, PeerLinear)
    return {name: m for name, m in decoder.named_modules() if isinstance(m, found) and not is_head(name)}


def weight_bytes(decoder: Decoder) -> int:
    """What the linear layers read of their weights for a token."""
    return sum(map(_bytes_of, linears_of(decoder).values()))


def _bytes_of(module: nn.Module) -> int:
    if isinstance(module, PeerLinear):
        return module.operand.nbytes
    if isinstance(module, QuantLinear):
        return module.weight.nbytes
    if (packed := packed_of(module)) is not None:
        return packed.nbytes
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)  # bitsandbytes
    if state is None:
        return weight.nbytes
    second = [state.state2.absmax, state.offset] if state.nested else []
    return tensor_bytes(weight, state.absmax, *second)
