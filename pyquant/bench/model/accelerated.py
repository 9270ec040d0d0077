"""A decoder of bitsandbytes' layers handed to ``pyquant.accelerate``, as its owner would."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..._replaced_forward import STATE
from ...accelerate import accelerate
from ...weight import PackedWeight
from .. import device as gpu_device
from ..providers.base import import_peer
from .decoder import Decoder
from .memory import Memory


@dataclass(frozen=True)
class AccelerateCost:
    """What one call took.

    Attributes:
        seconds: until the GPU has done its part.
        peak_gb: as :meth:`Memory.peak`, the original model included.
    """

    seconds: float
    peak_gb: float | None


def accelerate_decoder(decoder: Decoder, expected: set[str], device: str, memory: Memory) -> AccelerateCost:
    """``pyquant.accelerate(decoder, free_original=True)``.

    Args:
        expected: names of the modules that must be replaced.

    Raises:
        RuntimeError: one of them was not; with the reason.
    """
    memory.start_peak()  # synchronizes
    start = time.perf_counter()
    try:
        done = accelerate(decoder, free_original=True)
    except ValueError as error:  # nothing was replaced: a line for each layer
        raise RuntimeError("; ".join(line.strip() for line in str(error).splitlines()[:2])) from error
    if device == "cuda":
        gpu_device.synchronize()
    seconds = time.perf_counter() - start
    missing = sorted(expected - set(done.replaced))
    if missing:
        reason = done.kept.get(missing[0], "not seen")
        raise RuntimeError(f"accelerate: {len(missing)} of {len(expected)} layers kept; {missing[0]}: {reason}")
    return AccelerateCost(round(seconds, 4), memory.peak())


def packed_of(module: nn.Module) -> PackedWeight | None:
    """The weight that an accelerated module runs on; None for any other module."""
    state = getattr(module, STATE, None)
    return None if state is None else state.packed.weight


def dequantized_by_bitsandbytes(module: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] of an accelerated ``Linear4bit``, as its own library has it: of the original bytes, which are
    made again from the packed ones."""
    weight: Any = module.weight
    stored, absmax = getattr(module, STATE).packed.original()
    state = copy.copy(weight.quant_state)
    state.absmax, state.dtype = absmax, dtype
    return import_peer("bitsandbytes").functional.dequantize_4bit(stored, state)
