"""Weights for the CUDA tests: every variant, shapes around the tile sizes, poisoned memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from conftest import Variant, raw

from pyquant import PackedWeight, QuantizedWeight

# One row and column, odd sizes, tails of a byte, a chunk of 8, a block of 64, a tile of 256, and whole tiles.
SHAPES = [(1, 1), (1, 300), (70, 150), (3, 257), (130, 17), (64, 512), (65, 328), (200, 64)]


def cases(variant: Variant) -> list[tuple[int, int, int]]:
    """(N, K, group size): each group size with the shapes that it divides, leaves a rest in, or covers."""
    return [(n, k, g) for n, k in SHAPES for g in variant.group_sizes(k)]


def poison(bytes_: int = 1 << 26) -> None:
    """Leave garbage in the memory that the allocator hands out next."""
    torch.full((bytes_,), 0xA5, dtype=torch.uint8, device="cuda")


def on_gpu(weight: Any) -> Any:
    return weight.to("cuda")


def same_bytes(a: QuantizedWeight | PackedWeight, b: QuantizedWeight | PackedWeight) -> bool:
    """Every field equal, tensors bit for bit, on whatever device each is."""
    assert type(a) is type(b)
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            if x.dtype != y.dtype or x.shape != y.shape or not torch.equal(raw(x.cpu()), raw(y.cpu())):
                return False
        elif x != y:
            return False
    return True
