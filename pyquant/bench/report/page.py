"""The report as one HTML page that needs nothing else: plotly's script is inside."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .charts import Chart, Heatmap, Line, log_ticks

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_DASHES = {"-": "solid", "--": "dash", ":": "dot"}
_MARKERS = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
            "X": "x", "*": "star", "x": "x-thin-open", "+": "cross-thin-open", "1": "y-down-open", "2": "y-up-open",
            "3": "y-left-open", "4": "y-right-open", "|": "line-ns-open"}  # fmt: skip
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 14px; } th, td { padding: 3px 12px; text-align: right; }
th { border-bottom: 1px solid #888; } td { border-bottom: 1px solid #eee; }
th:first-child, td:first-child, td:nth-child(2), td:nth-child(3) { text-align: left; }
.note { color: #555; } .wide { overflow-x: auto; }
"""


class Page:
    """Parts of the page, one below the other."""

    def __init__(self, title: str, note: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="note">{html.escape(note)}</p>']
        self._has_script = False

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, frame: pd.DataFrame) -> None:
        """The frame; fractions with two digits."""
        text = frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.2f}")
        self._parts.append(f'<div class="wide">{text}</div>')

    def charts(self, charts: Sequence[Chart]) -> None:
        """One plot; a menu switches between several charts."""
        import plotly.graph_objects as go

        figure = go.Figure()
        owners = []
        for i, chart in enumerate(charts):
            for trace in _traces(chart):
                figure.add_trace(trace.update(visible=i == 0))
                owners.append(i)
        layouts = [_layout(chart) for chart in charts]
        figure.update_layout(layouts[0])
        self._menu(figure, [chart.title for chart in charts], layouts, owners)

    def heatmaps(self, maps: Sequence[Heatmap]) -> None:
        """One plot; a menu switches between several maps."""
        import plotly.graph_objects as go

        figure = go.Figure()
        layouts = []
        for i, each in enumerate(maps):
            logs = [[math.log2(v) if v == v else None for v in row] for row in each.values]
            text = [[f"{v:.2f}" if v == v else "" for v in row] for row in each.values]
            bar = {"title": each.value_title, "tickvals": [-2, -1, 0, 1, 2], "ticktext": ["0.25", "0.5", "1", "2", "4"]}
            figure.add_trace(
                go.Heatmap(z=logs, x=list(each.columns), y=list(each.rows), text=text, texttemplate="%{text}", zmin=-2,
                           zmax=2, colorscale="RdBu", colorbar=bar, visible=i == 0,
                           hovertemplate="%{y}, M = %{x}: %{text}x<extra></extra>")
            )  # fmt: skip
            axes = {"xaxis": {"title": {"text": each.x_title}, "type": "category"},
                    "yaxis": {"title": {"text": "N x K"}, "type": "category", "autorange": "reversed"}}  # fmt: skip
            layouts.append({"title": {"text": each.title}, **axes})
        figure.update_layout(layouts[0])
        self._menu(figure, [m.title for m in maps], layouts, list(range(len(maps))), 260 + 26 * len(maps[0].rows))

    def _menu(
        self, figure: go.Figure, titles: Sequence[str], layouts: Sequence[dict[str, Any]], owners: Sequence[int],
        height: int = 620,
    ) -> None:  # fmt: skip
        if len(titles) > 1:
            buttons = [
                {"label": title, "method": "update", "args": [{"visible": [o == i for o in owners]}, layouts[i]]}
                for i, title in enumerate(titles)
            ]
            figure.update_layout(updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02,
                                               "yanchor": "bottom"}])  # fmt: skip
        figure.update_layout(template="plotly_white", height=height, margin={"l": 80, "r": 20, "t": 90, "b": 60})
        script = False if self._has_script else "inline"
        self._has_script = True
        self._parts.append(figure.to_html(full_html=False, include_plotlyjs=script))

    def html(self) -> str:
        head = f'<meta charset="utf-8"><title>{html.escape(self._title)}</title><style>{_STYLE}</style>'
        body = "\n".join(self._parts)
        return f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>\n{body}\n</body></html>\n"


def _traces(chart: Chart) -> list[Any]:
    import plotly.graph_objects as go

    traces = [_trace(line, chart.joined) for line in chart.lines]
    if chart.reference:
        value, text = chart.reference
        xs = [x for line in chart.lines for x in line.x]
        traces.append(go.Scatter(x=[min(xs), max(xs)], y=[value, value], name=text, mode="lines", hoverinfo="skip",
                                 line={"color": "#888888", "dash": "dot", "width": 1.5}))  # fmt: skip
    return traces


def _trace(line: Line, joined: bool) -> Any:
    import plotly.graph_objects as go

    style = line.style
    points = bool(style["marker"])
    mode = "lines" if not points else "lines+markers" if joined else "markers"
    marker: dict[str, Any] | None = None
    if points:
        symbol = _MARKERS[style["marker"]]
        hollow = style.get("markerfacecolor") == "white"
        marker = {"symbol": f"{symbol}-open" if hollow else symbol, "size": 8, "color": style["color"]}
        if hollow or symbol.endswith("-open"):
            marker["line"] = {"width": 2, "color": style["color"]}
    return go.Scatter(
        x=list(line.x),
        y=list(line.y),
        name=line.label,
        mode=mode,
        text=list(line.hover),
        hovertemplate="%{text}<extra>%{fullData.name}</extra>",
        line={"color": style["color"], "dash": _DASHES[style["linestyle"]], "width": style["linewidth"]},
        marker=marker,
        opacity=1 if joined or not points else 0.75,
    )


def _layout(chart: Chart) -> dict[str, Any]:
    xs = chart.ticks or log_ticks([x for line in chart.lines for x in line.x])
    x = {"title": {"text": chart.x_title}, "tickangle": 0, **_log_axis(xs)}
    y = {"title": {"text": chart.y_title}, **_log_axis(log_ticks([y for line in chart.lines for y in line.y]))}
    title = {"text": chart.title, "subtitle": {"text": chart.subtitle}}
    return {"title": title, "xaxis": x, "yaxis": y}


def _log_axis(ticks: Sequence[float]) -> dict[str, Any]:
    return {"type": "log", "tickvals": list(ticks), "ticktext": [f"{tick:g}" for tick in ticks]}
