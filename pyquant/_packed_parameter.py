"""A bitsandbytes parameter beside its packed form; its own bytes can be freed and made again."""

from __future__ import annotations

import torch

from ._freed import FreedTensor
from ._packed_cache import version_of
from ._quant_state import stored_codes, weight_of_quant_state
from .ops import op_arguments


class PackedParameter:
    """The packed form of a ``Params4bit`` and its ``quant_state``.

    Attributes:
        parameter: the ``Params4bit``.
        weight: the packed weight.
        tensors, integers: the arguments of ``pyquant.ops.gemm``.
        version: the parameter's version when it was packed; None for an inference tensor, which counts none.
        counter: an empty tensor that has the parameter's version.
        freed: whether the parameter's bytes and its absmax are freed.
    """

    def __init__(self, parameter: torch.nn.Parameter, name: str) -> None:
        self.parameter = parameter
        self.name = name
        self.freed = False
        self.pack()

    def pack(self) -> None:
        """Make the packed form from the parameter, which must not be freed.

        Raises:
            LoadError: naming the tensor that does not fit.
        """
        with torch.no_grad():
            quant_state = self.parameter.quant_state  # type: ignore[attr-defined]
            self.weight = weight_of_quant_state(self.parameter.detach(), quant_state, self.name).pack()
        self.tensors, self.integers = op_arguments(self.weight)
        self._count()

    def _count(self) -> None:
        # Shares the parameter's version counter, not its memory; and a plain tensor's attributes are read without
        # __torch_function__, which Params4bit has: 4 us a call less.
        self.counter = self.parameter.detach()
        self.counter.data = torch.empty(0, dtype=self.counter.dtype, device=self.counter.device)
        self.version = version_of(self.parameter)

    @property
    def is_current(self) -> bool:
        """Whether the parameter is as it was when it was packed, and where the packed form is."""
        return self.version == version_of(self.parameter) and self.parameter.device == self.weight.device

    def free(self) -> None:
        """Free the parameter's bytes and its absmax.

        The parameter becomes empty on its device, ``quant_state.absmax`` a tensor that
        raises when it is used.
        """
        if self.freed:
            return
        if not self.is_current:
            self.pack()
        p, state = self.parameter, self.parameter.quant_state  # type: ignore[attr-defined]
        self._shape, self._dtype, self._absmax_shape = p.shape, p.dtype, state.absmax.shape
        # Behind the last whole byte of codes: what no weight holds.
        self._tail = p.detach().reshape(-1).view(torch.uint8)[self.weight.n * self.weight.k // 2 :].clone()
        p.data = torch.empty(0, 1, dtype=p.dtype, device=p.device)
        state.absmax = FreedTensor.like(state.absmax)
        self.freed = True

    def original(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameter's bytes and its absmax as they were, made from the packed form; new tensors."""
        weight = self.weight.unpack()
        codes = stored_codes(weight)[: weight.n * weight.k // 2]
        stored = torch.cat([codes, self._tail]).view(self._dtype).view(self._shape)
        return stored, weight.scales.reshape(self._absmax_shape)

    def restore(self) -> None:
        """Undo :meth:`free`, bit for bit."""
        if not self.freed:
            return
        with torch.no_grad():
            stored, absmax = self.original()
        self.parameter.data = stored
        self.parameter.quant_state.absmax = absmax  # type: ignore[attr-defined]
        self.freed = False
