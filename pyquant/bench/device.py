"""What the benchmark asks of the GPU."""

from __future__ import annotations

import torch

NAME = "cuda"


def l2_bytes() -> int:
    """Size of the L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def free_bytes() -> int:
    """Memory that torch can still allocate: free on the GPU, or held by torch and unused."""
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def synchronize() -> None:
    """Wait; raises RuntimeError if a kernel failed."""
    torch.cuda.synchronize()


def release() -> None:
    """Give memory that torch holds unused back, so that it can be cut anew."""
    torch.cuda.empty_cache()
