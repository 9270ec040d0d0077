"""What the providers of a GPU benchmark share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ...weight import PackedWeight, QuantizedWeight
from .. import device
from ..format_spec import FormatSpec

# Of the libraries that take plain 4-bit integers: what most of them publish figures for.
PEER_SPEC = FormatSpec("int4", 128)


class Unavailable(Exception):
    """Why a provider cannot take part, as a sentence's end: "not available because ..."."""


class Source:
    """A weight [N, K] and its quantized forms, made once and shared by all.

    Args:
        place: the weight's device, the GPU if not given.
        w: [N, K] in ``dtype``; random if not given.
    """

    def __init__(self, n: int, k: int, dtype: torch.dtype, place: str = "", w: torch.Tensor | None = None) -> None:
        self.n, self.k, self.dtype = n, k, dtype
        if w is None:
            place = place or device.NAME
            generator = torch.Generator(device=place).manual_seed(n * 1_000_003 + k)
            w = (torch.randn(n, k, device=place, generator=generator) * k**-0.5).to(dtype)
        self.w = w
        self._quantized: dict[FormatSpec, QuantizedWeight] = {}
        self._packed: dict[FormatSpec, PackedWeight] = {}
        self._dequantized: dict[FormatSpec, torch.Tensor] = {}

    def quantized(self, spec: FormatSpec) -> QuantizedWeight:
        """The canonical weight.

        Raises:
            Unavailable: when the weight's shape does not allow the format.
        """
        if spec not in self._quantized:
            try:
                self._quantized[spec] = spec.quantize(self.w)
            except ValueError as error:
                raise Unavailable(str(error)) from error
        return self._quantized[spec]

    def packed(self, spec: FormatSpec) -> PackedWeight:
        """The packed weight."""
        if spec not in self._packed:
            self._packed[spec] = self.quantized(spec).pack()
        return self._packed[spec]

    def dequantized(self, spec: FormatSpec) -> torch.Tensor:
        """The weight that the quantized one stands for, fp32."""
        if spec not in self._dequantized:
            self._dequantized[spec] = self.quantized(spec).dequantize()
        return self._dequantized[spec]


@dataclass(frozen=True)
class Operand:
    """One weight as a provider's kernel reads it.

    Attributes:
        weight: whatever ``call`` takes; copies are made with ``copy.deepcopy``.
        call: ``call(weight, x) -> y``.
        nbytes: what a call must read of the weight: codes, scales and the like.
        reference: the weight [N, K] that it stands for, fp32; None if it cannot be said.
    """

    weight: Any
    call: Callable[[Any, torch.Tensor], torch.Tensor]
    nbytes: int
    format: str
    group_size: int | None = None
    reference: Callable[[], torch.Tensor] | None = None

    def copies(self, count: int) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """``count`` calls, each on a copy of its own."""
        weights = [self.weight, *(copy.deepcopy(self.weight) for _ in range(count - 1))]
        return [self._on(weight) for weight in weights]

    def _on(self, weight: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        call = self.call
        return lambda x: call(weight, x)


class Provider(ABC):
    """Someone who computes y = x @ W^T from a weight of their own making."""

    name: ClassVar[str]  # what --provider takes
    ours: ClassVar[bool] = False  # pyquant's: held to the numerics contract, compared with the others
    slow: ClassVar[bool] = False  # compiles or tunes for seconds: runs only if named

    @property
    def label(self) -> str:
        """The CSV's ``provider``."""
        return self.name

    @abstractmethod
    def build(self, source: Source) -> Operand:
        """Quantize and pack.

        Raises:
            Unavailable: with the reason.
        """

    def instance(self, operand: Operand, x: torch.Tensor) -> str:
        """Name of the kernel that runs for x; "" if it cannot be said."""
        return ""


def require(condition: bool, reason: str) -> None:
    """Raise Unavailable(reason) unless ``condition``."""
    if not condition:
        raise Unavailable(reason)


def import_peer(module: str) -> Any:
    """The module.

    Raises:
        Unavailable: when it is not installed, or does not load.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except Exception as error:  # packages with compiled parts raise all kinds of things
        detail = str(error).strip().splitlines()
        raise Unavailable(
            f"{module} cannot be imported ({type(error).__name__}: {detail[0] if detail else ''})"
        ) from error


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


def peer_weight(source: Source) -> QuantizedWeight:
    """The weight of the plain 4-bit integer libraries: int4 in groups, scales in x's dtype."""
    group_size = PEER_SPEC.group_size or source.k
    require(source.k % group_size == 0, f"K must be a multiple of the group size {group_size}")
    return source.quantized(PEER_SPEC)


def peer_reference(source: Source) -> Callable[[], torch.Tensor]:
    """What :func:`peer_weight` stands for."""
    return lambda: source.dequantized(PEER_SPEC)


def unsigned_codes(weight: QuantizedWeight) -> torch.Tensor:
    """Codes of an int4 weight plus 8, two in a byte as stored: uint8 [N, K / 2], the lower k in the lower bits."""
    return weight.codes ^ 0x88
