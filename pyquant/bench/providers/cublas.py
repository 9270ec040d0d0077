"""The vendor's GEMM on the dequantized weight."""

from __future__ import annotations

import torch.nn.functional as F

from ..format_spec import FormatSpec
from ..problem import DTYPE_NAMES
from .base import Operand, Provider, Source


class Cublas(Provider):
    """``F.linear`` on the weight dequantized beforehand."""

    name = "cublas"

    def __init__(self, spec: FormatSpec, dtype_name: str) -> None:
        self.spec, self.dtype_name = spec, dtype_name

    @property
    def label(self) -> str:
        return f"{self.name}_{self.dtype_name}"

    def build(self, source: Source) -> Operand:
        reference = source.dequantized(self.spec).to(source.dtype)
        return Operand(
            reference,
            lambda weight, x: F.linear(x, weight),
            reference.nbytes,
            DTYPE_NAMES[source.dtype],
            None,
            lambda: reference.float(),
        )
