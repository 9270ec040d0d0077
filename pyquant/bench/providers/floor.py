"""The floor: a kernel that reads as many bytes as the weight has, and does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..graph_timing import cold_copies, time_graph
from .base import Unavailable, require

_ALIGNMENT = 256


class Floor:
    """us to read a number of bytes from cold memory, measured once for each number."""

    def __init__(self, cold_bytes: int) -> None:
        self._cold_bytes = cold_bytes
        self._us: dict[int, float] = {}

    def us(self, nbytes: int) -> float:
        """Plain launches, back to back, each call on bytes of its own.

        Raises:
            Unavailable: without the operator.
        """
        if nbytes not in self._us:
            self._us[nbytes] = self._measure(nbytes)
        return self._us[nbytes]

    def _measure(self, nbytes: int) -> float:
        require(hasattr(torch.ops.pyquant, "read_floor"), "this build has no torch.ops.pyquant.read_floor")
        step = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        count = cold_copies(step, self._cold_bytes)
        try:
            data = torch.randint(-(2**62), 2**62, (count * step // 8,), device="cuda").view(torch.uint8)
        except torch.OutOfMemoryError as error:
            raise Unavailable(f"{count * step / 1e9:.1f} GB do not fit in the GPU's memory") from error
        scratch = torch.zeros(64, dtype=torch.uint8, device="cuda")

        def read(at: int) -> Callable[[torch.Tensor], None]:
            part = data[at : at + nbytes]
            return lambda _: torch.ops.pyquant.read_floor(part, scratch)

        return time_graph([read(i * step) for i in range(count)], scratch, 0).us
