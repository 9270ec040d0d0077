"""Runs a function on several processes that talk through torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh


def run_ranks(
    function: Callable[..., None], folder: Path, device: str = "cpu", ranks: int = 2, *arguments: Any
) -> None:
    """``function(mesh, *arguments)`` on each rank of a one-dimensional mesh; an error of any rank fails the test."""
    mp.spawn(_rank, (function, folder / "store", device, ranks, arguments), nprocs=ranks)


def _rank(
    rank: int, function: Callable[..., None], store: Path, device: str, ranks: int, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same model on every rank
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        function(init_device_mesh(device, (ranks,)), *arguments)
    finally:
        dist.destroy_process_group()
