"""The quantized tensors of a module beside their packed form; they can be freed and made again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from ._freed import FreedTensor
from ._packed_cache import version_of
from .load import LoadedLayer, LoadError
from .ops import op_arguments


class PackedModule(ABC):
    """The packed form of what a module keeps in tensors of its own, by the names that a subclass knows.

    Attributes:
        weight: the packed weight.
        permutation: as in ``LoadedLayer``.
        tensors, integers: the arguments of ``pyquant.ops.gemm``.
        freed: whether the module's own tensors are freed.
    """

    def __init__(self, module: Any, name: str) -> None:
        self._module = module
        self._name = name
        self._free_again = False
        self.freed = False
        self.pack()

    @abstractmethod
    def _load(self) -> LoadedLayer:
        """The canonical weight of the module's tensors, which are not freed."""

    @abstractmethod
    def _sources(self) -> tuple[torch.Tensor, ...]:
        """All tensors that the weight depends on, as the module has them now."""

    @abstractmethod
    def _stored(self) -> dict[str, torch.Tensor]:
        """Those that can be freed, by name."""

    @abstractmethod
    def _put(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the module these in their place."""

    @abstractmethod
    def _emptied(self) -> dict[str, torch.Tensor]:
        """What stands in the module for them while they are freed; ``_like`` has their shapes and dtypes."""

    @abstractmethod
    def original(self) -> dict[str, torch.Tensor]:
        """The module's tensors as they were, made from the packed form."""

    def pack(self) -> None:
        """Make the packed form from the module, whose tensors must not be freed; free them if they were to be.

        Raises:
            LoadError: naming the tensor that does not fit.
        """
        with torch.no_grad():
            layer = self._load()
            self.weight = layer.weight.pack()
        self._device = self.weight.device
        self.permutation = layer.permutation
        self.tensors, self.integers = op_arguments(self.weight)
        self._note_sources()
        if self._free_again:
            self.free()

    def _note_sources(self) -> None:
        self._noted = tuple((tensor, version_of(tensor)) for tensor in self._sources())

    @property
    def is_current(self) -> bool:
        """Whether the module's tensors are those that were packed, unchanged."""
        for now, (tensor, version) in zip(self._sources(), self._noted, strict=True):
            if now is not tensor or (version is not None and now._version != version):
                return False
        return self._noted[0][0].device == self._device

    def free(self) -> None:
        """Free the bytes of the module's tensors: the codes keep no row, the others raise when they are used.

        Raises:
            LoadError: they could not be made again bit for bit.
        """
        if self.freed:
            return
        if not self.is_current:
            self.pack()
        stored = self._stored()
        self._like = {name: FreedTensor.like(tensor) for name, tensor in stored.items()}
        for name, tensor in self.original().items():
            if not torch.equal(_bytes(tensor), _bytes(stored[name])):
                raise LoadError(f"{self._name}.{name}: cannot be made again from the packed weight, so is not freed")
        self._put(self._emptied())
        self.freed = self._free_again = True
        self._note_sources()

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
        with torch.no_grad():
            tensors = self.original()
        self._put(tensors)
        self.freed = False
        self._note_sources()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # NaN in codes that are viewed as floats is equal to itself.
    return tensor.contiguous().view(torch.uint8)
