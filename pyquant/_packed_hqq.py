"""The tensors of an ``HQQLinear`` beside their packed form."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ._packed_module import PackedModule
from .codes import unpack_codes
from .load import LoadedLayer, hqq
from .load._hqq import pack_hqq_codes


class PackedHqq(PackedModule):
    """The packed form of ``W_q`` and of ``scale`` and ``zero`` in ``meta``: ``uint4`` with float zeros."""

    def _load(self) -> LoadedLayer:
        module, prefix = self._module, self._name + "." if self._name else ""
        stored = {prefix + key: value for key, value in module.meta.items()} | {prefix + "W_q": module.W_q}
        return LoadedLayer(hqq(stored, self._name).weight)

    def _sources(self) -> tuple[torch.Tensor, ...]:
        # Of every call: nn.Module.__getattr__ would cost half a microsecond more.
        members = self._module.__dict__
        meta = members["meta"]
        return members["_parameters"]["W_q"], meta["scale"], meta["zero"]

    def _stored(self) -> dict[str, torch.Tensor]:
        module = self._module
        return {"W_q": module.W_q.detach(), "scale": module.meta["scale"], "zero": module.meta["zero"]}

    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        module = self._module
        module.W_q.data = tensors["W_q"]
        module.meta |= {"scale": tensors["scale"], "zero": tensors["zero"]}

    def _emptied(self) -> dict[str, torch.Tensor]:
        codes = self._module.W_q.data
        # Without rows, so that HQQ's own functions come as far as the scales, which say what happened.
        return {**self._like, "W_q": codes.new_empty(0, codes.shape[1])}

    def original(self) -> dict[str, torch.Tensor]:
        weight = self.weight.unpack()
        assert weight.zeros is not None
        codes = unpack_codes(weight.codes, weight.k, 4).view(-1, weight.group_size)
        like = self._like
        stored = pack_hqq_codes(codes, self._module.meta["packing"])
        return {
            "W_q": stored.view(like["W_q"].dtype).view(like["W_q"].shape),
            "scale": weight.scales.reshape(like["scale"].shape).to(like["scale"].dtype),
            "zero": weight.zeros.reshape(like["zero"].shape).to(like["zero"].dtype),
        }
