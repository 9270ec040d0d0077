"""Fits the coefficients of the library's cost model (cutlass_ext/cost_model.hpp) to measured times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .. import _library
from .measurements import is_dense
from .schema import ENCODINGS, FAMILIES
from .table import CostModel

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

# Weights that have to be measured before a model says more than the nearest of them.
FEWEST_SHAPES = 8

# Where the search starts, and what a coefficient stays at that no measured weight depends on: rounded from fits to all
# weights of the H200, so that scores of tables from half of them are not independent of the other half in those.
_STREAM = [(2900, 18, 100, 1000), (2900, 25, 200, 1500), (2900, 37, 400, 2000), (2900, 48, 400, 2000), (200,)]
_WGMMA = [(65, 70), (75, 80), (55, 170), (10, 370), (3700, 800, 3.5, 8, 0.7, 1, 0.1)]
_DENSE = [(4400, 80, 380, 750, 95, 400, 3800, 33, 6, 3, 0.1)]
_START = {
    family: np.array([c for group in groups for c in group], dtype=np.float64)
    for family, groups in (("stream", _STREAM), ("wgmma", _WGMMA), ("dense", _DENSE))
}
# Relative errors beyond this count less and less: one bad measurement must not bend the model.
_OUTLIER = 0.05
# How far a coefficient may go for nothing: a factor of e costs as much as an error of 2% in one measurement.
_STIFFNESS = 0.02
# A stream launch takes 32 tokens; what more tokens take follows from it.
_STREAM_TOKENS = 32


def fit_models(times: pd.DataFrame, processors: int) -> tuple[CostModel, ...]:
    """The models of those encodings of which enough weights were measured with every family of kernels.

    Args:
        times: of :class:`~pyquant.tables.measurements.Measurements`, of a GPU.
        processors: its SMs.
    """
    models = []
    half = times[times["dtype"] != "fp32"]
    for encoding in ENCODINGS:
        rows = half[half["encoding"] == encoding]
        families = {family: rows[_is_of(rows["instance"], family)] for family in FAMILIES}
        if any(len(set(zip(of["n"], of["k"], strict=True))) < FEWEST_SHAPES for of in families.values()):
            continue
        models.append(CostModel(encoding, {name: fit(name, of, processors) for name, of in families.items()}))
    return tuple(models)


def _is_of(instances: pd.Series, family: str) -> pd.Series:
    if family == "dense":
        return instances.map(lambda name: name.startswith("cuda_") and is_dense(name))
    return instances.str.startswith(f"cuda_{family}_")


def fit(family: str, times: pd.DataFrame, processors: int) -> tuple[float, ...]:
    """Coefficients with the least relative errors over ``times``, with 4 digits."""
    from scipy.optimize import least_squares

    if family == "stream":
        times = times[times["m"] <= _STREAM_TOKENS]
    shapes = [np.ascontiguousarray(times[name], dtype=np.int64) for name in ("n", "k", "m")]
    target = np.log(times["us"].to_numpy(dtype=np.float64) * 1e3)
    start, index = _START[family], list(FAMILIES).index(family)

    def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = np.log(_library.predict(index, start * np.exp(logs), shapes, processors))
        return np.concatenate([predicted - target, _STIFFNESS * logs])

    found = least_squares(errors, np.zeros(len(start)), loss="soft_l1", f_scale=_OUTLIER, max_nfev=60)
    return tuple(float(f"{c:.4g}") for c in start * np.exp(found.x))
