"""Rows of a benchmark as a table of times, each beside those it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..rows import INCORRECT, Row

if TYPE_CHECKING:
    import pandas as pd

CUBLAS = "cublas"
DEQUANT = "dequant+cublas"
PROBLEM = ["dtype", "n", "k", "m"]


def sweep_of(rows: Sequence[Row]) -> pd.DataFrame:
    """The rows that are not incorrect, one for each label and problem, the median where there are several.

    Columns beside the rows' own: ``label``; ``ours``; ``shape``, such as ``4096 x 4096``; ``cublas_us`` of the same
    problem; ``speedup`` over it; ``dequant_us`` of dequantize + cuBLAS with the same format.

    Raises:
        ValueError: rows of several GPUs, or none of cuBLAS to compare with.
    """
    import pandas as pd

    gpus = sorted({row.gpu for row in rows})
    if len(gpus) != 1:
        raise ValueError(f"report: gpu: expected rows of one GPU, got {', '.join(gpus) or 'none'}")
    frame = pd.DataFrame([{**asdict(r), "label": r.label, "ours": r.ours} for r in rows if r.check != INCORRECT])
    keys = [*PROBLEM, "label", "ours", "provider", "format"]
    numbers = ["us", "weight_bytes", "tflops", "floor_us"]
    frame = frame[keys + numbers].astype(dict.fromkeys(numbers, float))  # None, where there is no floor, is NaN
    frame = frame.groupby(keys, as_index=False, sort=False).median()
    frame["shape"] = [f"{n} x {k}" for n, k in zip(frame["n"], frame["k"], strict=True)]
    dense = frame[frame["provider"].str.startswith(CUBLAS)]
    if dense.empty:
        raise ValueError(f"report: provider: expected rows of {CUBLAS} to compare with, got none")
    frame = frame.merge(dense[[*PROBLEM, "us"]].rename(columns={"us": "cublas_us"}), on=PROBLEM, how="left")
    through = frame.loc[frame["provider"] == DEQUANT, [*PROBLEM, "format", "us"]]
    frame = frame.merge(through.rename(columns={"us": "dequant_us"}), on=[*PROBLEM, "format"], how="left")
    frame["speedup"] = frame["cublas_us"] / frame["us"]
    return frame


def medians(sweep: pd.DataFrame) -> pd.DataFrame:
    """For each dtype, label and M: the median ``speedup`` over the shapes, and the number of ``shapes``."""
    known = sweep.dropna(subset=["speedup"])
    groups = known.groupby(["dtype", "label", "m"], as_index=False, sort=False)
    return groups.agg(speedup=("speedup", "median"), shapes=("shape", "nunique")).sort_values("m")


def packed_labels(sweep: pd.DataFrame) -> list[str]:
    """Labels of pyquant's kernels on packed weights, in the order of the rows."""
    mine = sweep[sweep["provider"].str.startswith("pyquant")]
    return list(dict.fromkeys(mine["label"]))
