"""What the report draws, as data: the page and the pictures are made from the same charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .roofline import ceilings, intensity
from .sweep import CUBLAS, medians, packed_labels

if TYPE_CHECKING:
    import pandas as pd

Style = Mapping[str, Any]  # of pyquant.bench.plot.styles


@dataclass(frozen=True)
class Line:
    """``hover``: what the page says of each point."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    hover: Sequence[str]
    style: Style


@dataclass(frozen=True)
class Chart:
    """Lines, or points, on logarithmic axes.

    Attributes:
        name: of the picture's file, without its suffix.
        reference: a dotted line at this y, and what it means.
        ticks: of the x axis, where they are not powers of ten.
        joined: whether the points of a line are joined.
    """

    name: str
    title: str
    x_title: str
    y_title: str
    lines: Sequence[Line]
    subtitle: str = ""
    reference: tuple[float, str] | None = None
    ticks: Sequence[int] = ()
    joined: bool = True


@dataclass(frozen=True)
class Heatmap:
    """A value for each of ``rows`` and ``columns``; NaN: not measured."""

    name: str
    title: str
    x_title: str
    value_title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]] = field(repr=False)


_M = "M (tokens)"
_FEWEST = 4  # ticks of an axis


def log_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around ``values`` for a logarithmic axis: 1, 2, 5, 10, ...; where too few of these are among the
    values, numbers at equal distances."""
    low, high = min(values) / 1.05, max(values) * 1.05
    powers = range(math.floor(math.log10(low)) - 2, math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    steps = (digit * 10.0**power for power in reversed(powers) for digit in (5, 2, 1))
    while len(inside) < _FEWEST:
        step = next(steps)
        inside = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return inside


def speedup_chart(sweep: pd.DataFrame, dtype: str, styles: Mapping[str, Style]) -> Chart:
    """Median over shapes of the speedup over cuBLAS, against M."""
    others = sweep[~sweep["provider"].str.startswith(CUBLAS)]
    table = medians(others[others["dtype"] == dtype])
    lines = []
    for label, rows in _in_order(table, styles):
        hover = [f"M = {r.m}: {r.speedup:.2f}x, median of {r.shapes} shapes" for r in rows.itertuples()]
        lines.append(Line(label, rows["m"].tolist(), rows["speedup"].tolist(), hover, styles[label]))
    counts = sorted({int(count) for count in table["shapes"]})
    shapes = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    title = f"Speedup over cuBLAS {dtype}, median over {shapes} shapes"
    ticks = _spaced(table["m"])
    reference = (1.0, f"cuBLAS {dtype}")
    return Chart(f"speedup_{dtype}", title, _M, "times as fast", lines, reference=reference, ticks=ticks)


def time_charts(sweep: pd.DataFrame, styles: Mapping[str, Style]) -> list[Chart]:
    """us of a call against M, a chart for each shape."""
    charts = []
    for (dtype, shape), table in sweep.groupby(["dtype", "shape"], sort=False):
        lines = []
        for label, rows in _in_order(table.sort_values("m"), styles):
            hover = [f"M = {r.m}: {r.us:.2f} µs" for r in rows.itertuples()]
            lines.append(Line(label, rows["m"].tolist(), rows["us"].tolist(), hover, styles[label]))
        mine = table[table["label"].isin(packed_labels(table))]
        floor = mine["floor_us"].min()
        reference = None if floor != floor else (float(floor), "floor: only read the smallest weight")
        name = f"time_{dtype}_{shape.replace(' ', '')}"
        ticks = _spaced(table["m"])
        title = f"{shape}, {dtype}"
        charts.append(Chart(name, title, _M, "µs per call", lines, reference=reference, ticks=ticks))
    return charts


def heatmaps(sweep: pd.DataFrame) -> list[Heatmap]:
    """Speedup over cuBLAS of each of pyquant's labels, by shape and M."""
    maps = []
    for label in packed_labels(sweep):
        for dtype, rows in sweep[sweep["label"] == label].groupby("dtype", sort=False):
            table = rows.assign(size=rows["n"] * rows["k"]).pivot_table(
                index=["size", "shape"], columns="m", values="speedup"
            )
            if table.empty:
                continue
            shapes = [shape for _, shape in table.index]
            name = f"shapes_{dtype}_{label.replace(' ', '_')}"
            title = f"{label}, {dtype}: speedup over cuBLAS"
            columns = [str(m) for m in table.columns]
            maps.append(Heatmap(name, title, _M, "times as fast", shapes, columns, table.to_numpy().tolist()))
    return maps


def roofline_chart(sweep: pd.DataFrame, dtype: str, styles: Mapping[str, Style]) -> Chart:
    """TFLOP/s of each call against its operations a byte, below the ceilings that were measured."""
    table = sweep[sweep["dtype"] == dtype]
    table = table.assign(intensity=intensity(table))
    limits = ceilings(table)
    lines = []
    for label, rows in _in_order(table, styles):
        hover = [f"{r.shape}, M = {r.m}: {r.tflops:.1f} TFLOP/s, {r.us:.2f} µs" for r in rows.itertuples()]
        lines.append(Line(label, rows["intensity"].tolist(), rows["tflops"].tolist(), hover, styles[label]))
    low, high = float(table["intensity"].min()), float(table["intensity"].max())
    xs = [low, high]
    if limits.tb_per_s is not None and limits.tflops is not None:
        xs.insert(1, min(max(limits.tflops / limits.tb_per_s, low), high))
    bandwidth = "no floor" if limits.tb_per_s is None else f"floor kernel {limits.tb_per_s:.2f} TB/s"
    compute = "cuBLAS at most" if limits.tflops is None else "cuBLAS"
    subtitle = f"measured: {bandwidth}; {compute} {limits.at}"
    if limits.tb_per_s is not None or limits.tflops is not None:
        style = {"color": "#000000", "linestyle": "-", "linewidth": 1.6, "marker": "", "zorder": 1}
        roof = [limits.tflops_at(x) for x in xs]
        lines.insert(0, Line("measured ceilings", xs, roof, [subtitle] * len(xs), style))
    title = f"Roofline, {dtype} (bytes: packed weight, x, y)"
    x_title = "operations per byte"
    return Chart(f"roofline_{dtype}", title, x_title, "TFLOP/s", lines, subtitle=subtitle, joined=False)


def _spaced(values: pd.Series) -> list[int]:
    """Those that have room for a label on a logarithmic axis, powers of two before others."""
    spaced: list[int] = []
    for m in sorted({int(value) for value in values}, key=lambda m: (m & (m - 1) != 0, m)):
        if all(abs(math.log2(m / other)) > 0.45 for other in spaced):
            spaced.append(m)
    return sorted(spaced)


def _in_order(table: pd.DataFrame, styles: Mapping[str, Style]) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each label, in the order of ``styles``."""
    present = set(table["label"])
    return [(label, table[table["label"] == label]) for label in styles if label in present]
