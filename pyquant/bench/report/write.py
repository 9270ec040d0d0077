"""Writes the report's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..plot import styles_of
from ..rows import ROWS_FILE, Row, csv_writer
from .charts import heatmaps, roofline_chart, speedup_chart, time_charts
from .crossover import crossovers
from .outliers import CAMPING, SLOW, camping, slow_shapes
from .page import Page
from .pictures import draw_chart, draw_heatmaps
from .sweep import sweep_of

if TYPE_CHECKING:
    import pandas as pd

_TABLE_ROWS = 20  # of a table of outliers
_CROSSOVER = (
    "The M up to which pyquant's GEMM on the packed weight is faster: of the median over the shapes, and the lowest "
    "and highest of single shapes. Between measured M by the straight line over log M."
)
_NO_NEIGHBOURS = "Not known: no weight whose N is a power of two was measured beside one of a similar N and the same K."


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """``index.html``, ``rows.csv`` and the pictures, in ``folder``, which is made if it is not there.

    Raises:
        ValueError: as :func:`~pyquant.bench.report.sweep.sweep_of`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / ROWS_FILE  # first: measuring again may take long
    with csv_writer(table) as write:
        for row in rows:
            write(row)
    sweep = sweep_of(rows)
    styles = styles_of(rows)
    note = _note(rows)
    page = Page("y = x Wᵀ with packed weights: times against M", note)
    written = []
    dtypes = list(dict.fromkeys(sweep["dtype"]))

    page.heading("Over all shapes")
    for dtype in dtypes:
        chart = speedup_chart(sweep, dtype, styles)
        page.charts([chart])
        written.append(folder / f"{chart.name}.png")
        draw_chart(chart, written[-1], note)
    page.heading("Crossover")
    page.paragraph(_CROSSOVER)
    page.table(crossovers(sweep))

    page.heading("By shape")
    page.charts(time_charts(sweep, styles))
    maps = heatmaps(sweep)
    if maps:
        page.heatmaps(maps)
        for dtype in dtypes:
            # Dependent launches are on the page only.
            mine = [m for m in maps if m.name.startswith(f"shapes_{dtype}_") and "_pdl_" not in m.name]
            if mine:
                written.append(folder / f"shapes_{dtype}.png")
                draw_heatmaps(mine, written[-1], note)
    _outliers(page, sweep)

    page.heading("Roofline")
    for dtype in dtypes:
        chart = roofline_chart(sweep, dtype, styles)
        page.charts([chart])
        written.append(folder / f"{chart.name}.png")
        draw_chart(chart, written[-1], note)
    index = folder / "index.html"
    index.write_text(page.html(), encoding="utf-8")
    return [index, *written, table]


def _outliers(page: Page, sweep: pd.DataFrame) -> None:
    page.heading("Memory camping")
    found = camping(sweep)
    if found is None:
        page.paragraph(_NO_NEIGHBOURS)
    else:
        slow = found[found["worst"] > CAMPING]
        page.paragraph(
            f"{len(found)} times somebody ran a weight whose N is a power of two beside one of a similar N. "
            f"{len(slow)} times a row of the weight took over {CAMPING:.0%} more time than a row of the neighbours, at "
            "some M."
        )
        if not slow.empty:
            page.table(slow.head(_TABLE_ROWS).assign(worst=[f"{value:+.0%}" for value in slow["worst"][:_TABLE_ROWS]]))
    page.heading("Slow shapes")
    slow = slow_shapes(sweep)
    shown = "" if len(slow) <= _TABLE_ROWS else f"; the {_TABLE_ROWS} furthest below"
    page.paragraph(
        f"{len(slow)} times pyquant's speedup over cuBLAS was below {SLOW:.0%} of the median over the other shapes at "
        f"that M{shown}."
    )
    if not slow.empty:
        page.table(slow.head(_TABLE_ROWS))


def _note(rows: Sequence[Row]) -> str:
    """Where the figures come from."""

    def each(column: str) -> str:
        values = [str(getattr(row, column)) for row in rows]
        return ", ".join(value for value in dict.fromkeys(values) if value)

    days = ", ".join(sorted({row.date[:10] for row in rows}))
    software = f"torch {each('torch')}, CUDA {each('cuda')}, pyquant {each('pyquant')} ({each('commit')})"
    return f"{rows[0].gpu}, {software}, {days}; cold weights, CUDA graphs"
