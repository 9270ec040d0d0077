"""Ceilings that were measured, and where calls lie below them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..problem import DTYPES
from .sweep import CUBLAS

if TYPE_CHECKING:
    import pandas as pd


_NOISE = 1.1  # a kernel this much above a ceiling shows that it is none


@dataclass(frozen=True)
class Ceilings:
    """The best that kernels of the same run reached.

    Attributes:
        tb_per_s: of the floor kernel, which only reads; None: there are no floors.
        tflops: of cuBLAS; None: others are clearly faster, so M was too small for it to be a ceiling.
        at: the best of cuBLAS in words.
    """

    tb_per_s: float | None
    tflops: float | None
    at: str

    def tflops_at(self, intensity: float) -> float:
        """The ceiling for a call of so many operations a byte; inf without any."""
        compute = math.inf if self.tflops is None else self.tflops
        return compute if self.tb_per_s is None else min(compute, self.tb_per_s * intensity)


def ceilings(sweep: pd.DataFrame) -> Ceilings:
    """Of the rows of one dtype."""
    known = sweep.dropna(subset=["floor_us"])
    best = sweep[sweep["provider"].str.startswith(CUBLAS)].sort_values("tflops").iloc[-1]
    bandwidth = None if known.empty else float((known["weight_bytes"] / known["floor_us"]).max() / 1e6)
    tflops = float(best["tflops"])
    is_ceiling = sweep["tflops"].max() <= _NOISE * tflops
    at = f"{tflops:.0f} TFLOP/s, {best['shape']}, M = {best['m']}"
    return Ceilings(bandwidth, tflops if is_ceiling else None, at)


def intensity(sweep: pd.DataFrame) -> pd.Series:
    """Operations of each row's call over the bytes of its weight, x and y."""
    size = sweep["dtype"].map(lambda name: DTYPES[name].itemsize)
    moved = sweep["weight_bytes"] + sweep["m"] * (sweep["n"] + sweep["k"]) * size
    return 2 * sweep["m"] * sweep["n"] * sweep["k"] / moved
