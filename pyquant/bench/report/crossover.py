"""Up to which M a kernel is faster than a dense GEMM."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .sweep import packed_labels

if TYPE_CHECKING:
    import pandas as pd


def crossover(speedups: Sequence[tuple[int, float]]) -> float:
    """The M at which a speedup, by rising M, first falls below 1: where the straight line over log2 M between the two
    measured M meets log2 of 1. 0: it is below 1 from the start; inf: never."""
    if speedups[0][1] < 1:
        return 0.0
    for (m0, s0), (m1, s1) in itertools.pairwise(speedups):
        if s1 < 1:
            share = math.log2(s0) / (math.log2(s0) - math.log2(s1))
            return 2 ** (math.log2(m0) + share * (math.log2(m1) - math.log2(m0)))
    return math.inf


def crossovers(sweep: pd.DataFrame) -> pd.DataFrame:
    """A line for each of pyquant's labels and dtypes: its crossover with cuBLAS, and with dequantize + cuBLAS.

    Columns: ``x``, ``weights``, ``compared with``, ``median``: where the median over the shapes crosses; ``lowest`` and
    ``highest`` of single shapes; ``shapes``. M as text: ``below 1``, ``90``, ``above 2048``.
    """
    import pandas as pd

    lines = []
    for label in packed_labels(sweep):
        mine = sweep[sweep["label"] == label]
        for dtype, rows in mine.groupby("dtype", sort=False):
            for column, name in (("cublas_us", "cuBLAS"), ("dequant_us", "dequantize + cuBLAS")):
                known = rows.dropna(subset=[column])
                if known.empty:
                    continue
                known = known.assign(ratio=known[column] / known["us"]).sort_values("m")
                shapes = [list(zip(s["m"], s["ratio"], strict=True)) for _, s in known.groupby("shape")]
                # Of those that never cross, the one that was measured furthest.
                shapes.sort(key=lambda shape: (crossover(shape), shape[-1][0]))
                median = list(known.groupby("m")["ratio"].median().items())
                texts = [_text(speedups) for speedups in (median, shapes[0], shapes[-1])]
                lines.append([dtype, label, name, *texts, len(shapes)])
    return pd.DataFrame(lines, columns=["x", "weights", "compared with", "median", "lowest", "highest", "shapes"])


def _text(speedups: Sequence[tuple[int, float]]) -> str:
    m = crossover(speedups)
    return f"below {speedups[0][0]}" if m == 0 else f"above {speedups[-1][0]}" if math.isinf(m) else f"{m:.0f}"
