"""The tensors of a GPTQ or AWQ layer, codes in int32 words, beside their packed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._packed_module import PackedModule
from .load import LoadedLayer, LoadError, awq, gptq
from .load._awq import awq_tensors
from .load._gptq import gptq_tensors

FREED = ("qweight", "qzeros", "scales")


class _PackedWords(PackedModule):
    """The packed form of the buffers ``qweight``, ``qzeros`` and ``scales``."""

    def _own(self) -> dict[str, torch.Tensor]:
        """The three by the names that a checkpoint would give them."""
        prefix = self._name + "." if self._name else ""
        return {prefix + name: self._module._buffers[name] for name in FREED}

    def _sources(self) -> tuple[torch.Tensor, ...]:
        buffers = self._module._buffers
        return buffers["qweight"], buffers["qzeros"], buffers["scales"]

    def _stored(self) -> dict[str, torch.Tensor]:
        return {name: self._module._buffers[name] for name in FREED}

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._module._buffers.update(tensors)

    def _emptied(self) -> dict[str, torch.Tensor]:
        codes = self._module._buffers["qweight"]
        # A tensor with a device and without rows: libraries ask the codes where a module is.
        return {**self._like, "qweight": codes.new_empty(0, codes.shape[1])}


class PackedGptq(_PackedWords):
    """Also of ``g_idx``, which is not freed.

    Args:
        module: with ``bits`` and ``group_size``.
        name: of the module.
        checkpoint_format: "gptq" where the module's kernel adds one to stored zero points, else "gptq_v2".
        has_order: whether it reads ``g_idx``.
    """

    def __init__(self, module: Any, name: str, checkpoint_format: str, has_order: bool) -> None:
        self._checkpoint_format = checkpoint_format
        self._has_order = has_order
        super().__init__(module, name)

    def _load(self) -> LoadedLayer:
        module, stored = self._module, self._own()
        prefix = self._name + "." if self._name else ""
        if self._has_order:
            # gptqmodel leaves it on the CPU once it has dequantized a weight there.
            stored[prefix + "g_idx"] = module._buffers["g_idx"].to(module._buffers["qweight"].device)
        layer = gptq(
            stored, self._name, bits=module.bits, group_size=module.group_size,
            checkpoint_format=self._checkpoint_format,
        )  # fmt: skip
        largest = 1 << module.bits
        if layer.weight.zeros is not None and bool((layer.weight.zeros == largest).any()):
            raise LoadError(
                f"{prefix}qzeros: a stored zero point is {largest - 1}, which auto_gptq reads as {largest} or as 0, "
                "depending on its kernel; `pyquant convert` reads it as the former"
            )
        return layer

    def _sources(self) -> tuple[torch.Tensor, ...]:
        buffers = self._module._buffers
        return buffers["qweight"], buffers["qzeros"], buffers["scales"], buffers["g_idx"]

    def original(self) -> dict[str, torch.Tensor]:
        layer = LoadedLayer(self.weight.unpack(), None, self.permutation)
        return gptq_tensors(layer, self._module.bits, self._checkpoint_format)


class PackedAwq(_PackedWords):
    """Of the ``gemm`` layout in 4 bits."""

    def _load(self) -> LoadedLayer:
        return awq(self._own(), self._name, group_size=self._module.group_size)

    def original(self) -> dict[str, torch.Tensor]:
        return awq_tensors(self.weight.unpack())
