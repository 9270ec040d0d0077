"""The report's charts as PNG, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import Chart, Heatmap, log_ticks

_LEGEND_ROWS = 24
_LEVELS = (0.25, 0.5, 1, 2, 4)  # of the colour bar


def draw_chart(chart: Chart, path: Path, note: str) -> None:
    """Write the picture; ``note``: where the figures come from, below it."""
    from matplotlib.ticker import NullLocator

    figure = _figure(10, 5.4)
    panel = figure.subplots()
    panel.set_title(f"{chart.title}\n{chart.subtitle}".strip(), loc="left", fontsize=10)
    for line in chart.lines:
        style = dict(line.style)
        if not chart.joined and style["marker"]:
            style |= {"linestyle": "none", "markersize": 4, "alpha": 0.75}
        panel.plot(line.x, line.y, label=line.label, **style)
    if chart.reference:
        value, text = chart.reference
        panel.axhline(value, color="#888888", linewidth=1.2, linestyle=":", label=text)
    panel.set_xscale("log", base=2 if chart.ticks else 10)
    panel.set_yscale("log")
    xs = chart.ticks or log_ticks([x for line in chart.lines for x in line.x])
    ys = log_ticks([y for line in chart.lines for y in line.y])
    panel.set_xticks(xs, [f"{x:g}" for x in xs])
    panel.set_yticks(ys, [f"{y:g}" for y in ys])
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_locator(NullLocator())
    panel.set_xlabel(chart.x_title)
    panel.set_ylabel(chart.y_title)
    panel.grid(which="major", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    _note(figure, note)
    count = len(panel.get_legend_handles_labels()[1])
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, ncols=math.ceil(count / _LEGEND_ROWS))
    figure.savefig(path, dpi=150)


def draw_heatmaps(maps: Sequence[Heatmap], path: Path, note: str) -> None:
    """Write one picture with a panel for each map, two side by side."""
    from matplotlib.colors import LogNorm

    bands, columns = math.ceil(len(maps) / 2), min(2, len(maps))
    width = 1.8 + columns * (1.2 + 0.44 * max(len(m.columns) for m in maps))
    figure = _figure(width, 0.8 + bands * (1.1 + 0.3 * max(len(m.rows) for m in maps)))
    panels = figure.subplots(bands, columns, squeeze=False).ravel()
    image: Any = None
    for panel, each in zip(panels, maps, strict=False):
        image = panel.imshow(each.values, cmap="RdBu", norm=LogNorm(0.25, 4), aspect="auto")
        panel.set_xticks(range(len(each.columns)), each.columns, fontsize=8, rotation=45)
        panel.set_yticks(range(len(each.rows)), each.rows, fontsize=8)
        panel.set_xlabel(each.x_title)
        panel.set_title(each.title, loc="left", fontsize=10)
        for i, values in enumerate(each.values):
            for j, value in enumerate(values):
                if not math.isnan(value):
                    panel.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    for panel in panels[len(maps) :]:
        panel.remove()
    bar = figure.colorbar(image, ax=list(panels[: len(maps)]), label=maps[0].value_title, ticks=_LEVELS)
    bar.ax.set_yticklabels([f"{level:g}" for level in _LEVELS])
    bar.ax.minorticks_off()
    _note(figure, note)
    figure.savefig(path, dpi=150)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _note(figure: Any, note: str) -> None:
    figure.supxlabel(note, fontsize=8, color="#555555", x=0.01, ha="left")
