"""Memory of the GPU that a decoder takes."""

from __future__ import annotations

import gc

import torch

from .. import device as gpu_device


class Memory:
    """Counts what torch's allocator has handed out since it was constructed, in GB (1e9 bytes); None on the CPU."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self.release()
        self._before = torch.cuda.memory_allocated() if self._on_gpu else 0

    def release(self) -> None:
        """Drop what nobody uses, and cuBLAS' workspaces: one for each stream that it ran on, however long ago. There
        may be no CUDA graph whose kernels use them."""
        gc.collect()
        if self._on_gpu:
            gpu_device.synchronize()
            torch._C._cuda_clearCublasWorkspaces()
            gpu_device.release()

    def allocated(self) -> float | None:
        """Now, when all that nobody uses is released."""
        self.release()
        return self._gb(torch.cuda.memory_allocated()) if self._on_gpu else None

    def start_peak(self) -> None:
        """From here on :meth:`peak` counts."""
        self.release()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float | None:
        """The most since :meth:`start_peak`."""
        return self._gb(torch.cuda.max_memory_allocated()) if self._on_gpu else None

    def _gb(self, nbytes: int) -> float:
        return round((nbytes - self._before) / 1e9, 6)
