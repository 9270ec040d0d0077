"""pyquant itself, in three ways: as ``pyquant.linear`` dispatches, instance by instance, and dequantize + cuBLAS."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from ... import _library, ops
from ...weight import PackedWeight
from ..format_spec import FormatSpec
from ..rows import INSTANCE_PROVIDER
from .base import Operand, Provider, Source, require


class Packed(Provider):
    """``pyquant.linear`` on a packed weight; with ``pdl`` by programmatic dependent launch."""

    name = "pyquant"
    ours = True
    needs_gemm: bool | None = None  # a kernel of any kind: the dispatch may dequantize

    def __init__(self, spec: FormatSpec, pdl: bool = False) -> None:
        self.spec, self.pdl = spec, pdl

    @property
    def label(self) -> str:
        return f"{self.name} pdl" if self.pdl else self.name

    def build(self, source: Source) -> Operand:
        cuda_instances(self.needs_gemm)
        packed = source.packed(self.spec)
        reference = functools.partial(source.dequantized, self.spec)
        return Operand(packed, self.call(), packed.nbytes, str(self.spec), packed.group_size, reference)

    def call(self) -> Any:
        """``call(weight, x)``."""
        pdl = self.pdl
        return lambda weight, x: ops.linear(x, weight, pdl=pdl)

    def instance(self, operand: Operand, x: torch.Tensor) -> str:
        explanation = ops.explain(x, operand.weight)
        return f"{explanation.instance} + F.linear" if explanation.dense else explanation.instance


class Instance(Packed):
    """One kernel instance, whatever the dispatch would choose."""

    def __init__(self, spec: FormatSpec, index: int) -> None:
        super().__init__(spec)
        self.index = index
        self.instance_name = _library.instances()[index]["name"]

    @property
    def label(self) -> str:
        return INSTANCE_PROVIDER

    def call(self) -> Any:
        def run(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
            tensors, integers = ops.op_arguments(weight)
            return torch.ops.pyquant.gemm_instance(x, *tensors, None, *integers, self.index)

        return run

    def instance(self, operand: Operand, x: torch.Tensor) -> str:
        return self.instance_name


class DequantCublas(Packed):
    """Dequantize with pyquant's kernel, then ``F.linear``, both in every call."""

    name = "dequant+cublas"
    needs_gemm = False

    def call(self) -> Any:
        return lambda weight, x: F.linear(x, weight.dequantize(x.dtype))

    def instance(self, operand: Operand, x: torch.Tensor) -> str:
        return ""


def cuda_instances(is_gemm: bool | None) -> list[int]:
    """Indices of the instances that this GPU can run: GEMMs (True), those that dequantize (False), or all (None);
    none of those for transposed products.

    Raises:
        Unavailable: when there is none.
    """
    rows = enumerate(_library.instances())
    usable = [(i, row) for i, row in rows if row["device"] == "cuda" and row["available"] and not row["is_transposed"]]
    found = [i for i, row in usable if is_gemm is None or row["is_gemm"] == is_gemm]
    kind = {None: "", True: "GEMM ", False: "dequantization "}[is_gemm]
    status = _library.build_info().get("cuda", "unknown")
    require(bool(found), f"this build has no {kind}kernel for this GPU (CUDA {status})")
    return found
