"""Who takes part in a GPU benchmark: pyquant, cuBLAS, and other libraries where they are installed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..format_spec import FormatSpec
from .base import Operand, Provider, Source, Unavailable
from .bitsandbytes import BitsandbytesNf4, BitsandbytesNf4Nested
from .cublas import Cublas
from .floor import Floor
from .gemlite import Gemlite
from .humming import Humming
from .packed import DequantCublas, Instance, Packed, cuda_instances
from .tinygemm import Tinygemm
from .vllm import Machete, Marlin

PEERS: tuple[type[Provider], ...] = (
    BitsandbytesNf4,
    BitsandbytesNf4Nested,
    Tinygemm,
    Marlin,
    Machete,
    Humming,
    Gemlite,
)
NAMES = (Packed.name, DequantCublas.name, Cublas.name, *(peer.name for peer in PEERS))
DEFAULT_NAMES = tuple(name for name in NAMES if name not in {peer.name for peer in PEERS if peer.slow})

__all__ = ["DEFAULT_NAMES", "NAMES", "PEERS", "Floor", "Operand", "Provider", "Source", "Unavailable", "select"]


def select(
    names: Collection[str], formats: Sequence[FormatSpec], dtype_name: str, *, instances: bool, pdl: bool
) -> list[Provider]:
    """The providers called ``names`` in the order they are measured: pyquant last, when it can be compared.

    Args:
        names: of :data:`NAMES`.
        formats: pyquant runs on each.
        instances: every kernel instance in place of the one that the dispatch takes.
        pdl: measure pyquant with programmatic dependent launch as well.

    Raises:
        Unavailable: with ``instances``, when this build has none.
    """
    chosen: list[Provider] = [Cublas(formats[0], dtype_name)] if Cublas.name in names else []
    chosen += [peer() for peer in PEERS if peer.name in names]
    if DequantCublas.name in names:
        chosen += [DequantCublas(spec) for spec in formats]
    if Packed.name in names:
        for spec in formats:
            chosen += [Instance(spec, i) for i in cuda_instances(is_gemm=True)] if instances else [Packed(spec)]
            chosen += [Packed(spec, pdl=True)] if pdl else []
    return chosen
