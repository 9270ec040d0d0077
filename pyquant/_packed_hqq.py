"""The tensors of an ``HQQLinear`` beside their packed form; they can be freed and made again."""

from __future__ import annotations

from typing import Any

import torch

from ._freed import FreedTensor
from ._packed_cache import version_of
from .codes import unpack_codes
from .load import LoadError, hqq
from .load._hqq import pack_hqq_codes
from .ops import op_arguments
from .weight import QuantizedWeight


class PackedHqq:
    """The packed form of ``module.W_q`` and of ``scale`` and ``zero`` in ``module.meta``.

    Attributes:
        weight: the packed weight, ``uint4`` with float zeros.
        tensors, integers: the arguments of ``pyquant.ops.gemm``.
        freed: whether the module's own tensors are freed.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._module = module
        self._name = name
        self._free_again = False
        self.freed = False
        self.pack()

    def pack(self) -> None:
        """Make the packed form from the module, whose tensors must not be freed; free them if they were to be.

        Raises:
            LoadError: naming the tensor that does not fit.
        """
        module, prefix = self._module, self._name + "." if self._name else ""
        stored = {prefix + key: value for key, value in module.meta.items()} | {prefix + "W_q": module.W_q}
        with torch.no_grad():
            self.weight = hqq(stored, self._name).weight.pack()
        self.tensors, self.integers = op_arguments(self.weight)
        self._note_source()
        if self._free_again:
            self.free()

    def _note_source(self) -> None:
        module = self._module
        self._source = (module.W_q, version_of(module.W_q), module.meta["scale"], module.meta["zero"])

    @property
    def is_current(self) -> bool:
        """Whether the module's tensors are those that were packed, unchanged."""
        module = self._module
        stored, version, scale, zero = self._source
        return (
            module.W_q is stored
            and version_of(stored) == version
            and stored.device == self.weight.device
            and module.meta.get("scale") is scale
            and module.meta.get("zero") is zero
        )

    def free(self) -> None:
        """Free the bytes of ``W_q``, which keeps no row, and of ``scale`` and ``zero``, which raise when they are used.

        Raises:
            LoadError: they could not be made again bit for bit.
        """
        if self.freed:
            return
        if not self.is_current:
            self.pack()
        module = self._module
        originals = {"W_q": module.W_q.detach(), "scale": module.meta["scale"], "zero": module.meta["zero"]}
        self._like = {name: FreedTensor.like(tensor) for name, tensor in originals.items()}
        for name, tensor in self.original().items():
            if not torch.equal(tensor.view(torch.uint8), originals[name].view(torch.uint8)):
                raise LoadError(f"{self._name}.{name}: cannot be made again from the packed weight, so is not freed")
        # Without rows, so that HQQ's own functions come as far as the scales, which say what happened.
        module.W_q.data = module.W_q.data.new_empty(0, module.W_q.shape[1])
        module.meta |= {"scale": self._like["scale"], "zero": self._like["zero"]}
        self.freed = self._free_again = True
        self._note_source()

    def original(self) -> dict[str, torch.Tensor]:
        """The module's tensors as they were, made from the packed form."""
        weight: QuantizedWeight = self.weight.unpack()
        assert weight.zeros is not None
        codes = unpack_codes(weight.codes, weight.k, 4).view(-1, weight.group_size)
        like = self._like
        stored = pack_hqq_codes(codes, self._module.meta["packing"])
        return {
            "W_q": stored.view(like["W_q"].dtype).view(like["W_q"].shape),
            "scale": weight.scales.reshape(like["scale"].shape).to(like["scale"].dtype),
            "zero": weight.zeros.reshape(like["zero"].shape).to(like["zero"].dtype),
        }

    def settle(self) -> None:
        """After :meth:`thaw`: pack what was changed or moved, and free again what was freed."""
        if not self.is_current:
            self.pack()
        elif self._free_again:
            self.free()

    def restore(self) -> None:
        """Undo :meth:`free`, bit for bit."""
        self.thaw()
        self._free_again = False

    def thaw(self) -> None:
        """The same until the next :meth:`pack` or :meth:`settle`."""
        if not self.freed:
            return
        module = self._module
        with torch.no_grad():
            tensors = self.original()
        module.W_q.data = tensors["W_q"]
        module.meta |= {"scale": tensors["scale"], "zero": tensors["zero"]}
        self.freed = False
        self._note_source()
