"""Plots of benchmark rows: time against M, and the fraction of the floor against M. Needs matplotlib, no GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rows import Row

# pyquant's lines in strong colours and wide; the others in quieter ones.
_OUR_COLOURS = ("#0b62c4", "#d1390f", "#16833a", "#7b2fbe", "#b8860b", "#0e8f94", "#c2267d", "#5b4a3f")
_OTHER_COLOURS = ("#333333", "#e3a018", "#6fb1e0", "#7fbf7b", "#d98880", "#a993c9", "#9c8f80", "#5f9ea0", "#c0c0c0")
_OUR_MARKERS = "osD^vPX*"
_OTHER_MARKERS = "xx++1234|"
_MAX_COLUMNS = 4


def require_matplotlib() -> None:
    """Raise ValueError, saying what to install, unless plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--plot: needs matplotlib: pip install 'pyquant[profile]' ({error})") from error


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write a figure to ``path``, in the format of its suffix: for each shape a panel of us against M and below it,
    where the rows have floors, one of the floor's fraction."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys((r.n, r.k, r.dtype) for r in rows))
    styles = styles_of(rows)
    has_floor = any(r.floor_us is not None for r in rows)
    bands = math.ceil(len(shapes) / _MAX_COLUMNS)
    columns = math.ceil(len(shapes) / bands)
    heights = [3.4, 2.2] if has_floor else [3.4]
    figure = Figure(figsize=(1.2 + 4.1 * columns + 2.6, 0.9 + bands * (sum(heights) + 0.5)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        bands * len(heights), columns, squeeze=False, gridspec_kw={"height_ratios": heights * bands}, sharex=False
    )
    for i in range(bands * columns):
        top = i // columns * len(heights)
        panels = [grid[top + j][i % columns] for j in range(len(heights))]
        if i >= len(shapes):
            for panel in panels:
                panel.remove()
            continue
        mine = [r for r in rows if (r.n, r.k, r.dtype) == shapes[i]]
        _time_panel(panels[0], mine, styles)
        if has_floor:
            _fraction_panel(panels[1], mine, styles)
        panels[-1].set_xlabel("M (tokens)")
        if i % columns == 0:
            panels[0].set_ylabel("µs per call")
            if has_floor:
                panels[1].set_ylabel("floor / time")
    handles: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = sorted(handles, key=lambda label: list(styles).index(label) if label in styles else len(styles))
    figure.legend([handles[label] for label in order], order, loc="outside right upper", frameon=False, fontsize=9)
    first = rows[0]
    software = ", ".join(part for part in (f"torch {first.torch}", f"CUDA {first.cuda}" if first.cuda else "") if part)
    figure.suptitle(
        f"{first.gpu}: y = x Wᵀ, cold weights  ({software}, {first.date[:10]})", fontsize=11, x=0.01, ha="left"
    )
    figure.savefig(path, dpi=150)


def styles_of(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How each label is drawn: pyquant's first."""
    labels = list(dict.fromkeys(r.label for r in rows))
    ours = list(dict.fromkeys(r.label for r in rows if r.provider.startswith("pyquant")))
    others = [label for label in labels if label not in ours]
    styles: dict[str, dict[str, Any]] = {}
    plain = list(dict.fromkeys(label.replace(" pdl ", " ") for label in ours))
    for label in ours:
        dependent = " pdl " in label  # in the colour of its plain launch
        base = plain.index(label.replace(" pdl ", " "))
        styles[label] = {
            "color": _OUR_COLOURS[base % len(_OUR_COLOURS)],
            "marker": _OUR_MARKERS[base % len(_OUR_MARKERS)],
            "markerfacecolor": "white" if dependent else _OUR_COLOURS[base % len(_OUR_COLOURS)],
            "linestyle": "--" if dependent or base >= len(_OUR_COLOURS) else "-",
            "linewidth": 1.8 if dependent else 2.2,
            "markersize": 5,
            "zorder": 3,
        }
    for i, label in enumerate(others):
        styles[label] = {
            "color": _OTHER_COLOURS[i % len(_OTHER_COLOURS)],
            "marker": _OTHER_MARKERS[i % len(_OTHER_MARKERS)],
            "linestyle": "--" if label.startswith(("cublas", "dequant")) else "-",
            "linewidth": 1.3,
            "markersize": 5,
            "zorder": 2,
        }
    return styles


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    lines: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.m):
        lines.setdefault(row.label, []).append(row)
    return lines


def _time_panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    for label, line in _lines(rows).items():
        panel.plot([r.m for r in line], [r.us for r in line], label=label, **styles[label])
    floors = [r.floor_us for r in rows if r.floor_us is not None and r.provider.startswith("pyquant")]
    floors = floors or [r.floor_us for r in rows if r.floor_us is not None]
    if floors:
        panel.axhline(min(floors), color="#888888", linewidth=1.2, linestyle=":", label="floor: only read the weight")
    panel.set_yscale("log")
    # What is many times slower than pyquant and cuBLAS may leave the panel; else it would take most of it.
    of_interest = [r.us for r in rows if r.ours or r.provider.startswith("cublas")]
    if of_interest and max(r.us for r in rows) > 6 * max(of_interest):
        panel.set_ylim(top=6 * max(of_interest))
    panel.set_title(f"{rows[0].n} x {rows[0].k}, {rows[0].dtype}", loc="left", fontsize=10)
    _plain_log_ticks(panel.yaxis)
    _finish(panel, rows)


def _fraction_panel(panel: Any, rows: Sequence[Row], styles: dict[str, dict[str, Any]]) -> None:
    for label, line in _lines(rows).items():
        known = [r for r in line if r.floor_fraction is not None]
        panel.plot([r.m for r in known], [r.floor_fraction for r in known], **styles[label])
    panel.set_ylim(0, max(1.05, *(1.05 * (r.floor_fraction or 0) for r in rows)))
    panel.axhline(1, color="#888888", linewidth=1.2, linestyle=":")
    _finish(panel, rows)


def _finish(panel: Any, rows: Sequence[Row]) -> None:
    """The M axis, and what all panels share."""
    from matplotlib.ticker import NullLocator

    tokens = sorted({r.m for r in rows})
    panel.set_xscale("log", base=2)
    # A label needs room: on the log axis none within a fifth of an octave of the one before.
    labels = [m for i, m in enumerate(tokens) if i == 0 or m > tokens[i - 1] * 2**0.2]
    panel.set_xticks(labels, [str(m) for m in labels], fontsize=8, rotation=45 if len(labels) > 8 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.tick_params(axis="y", which="both", labelsize=8)
    panel.grid(which="major", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _plain_log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20, ... in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
