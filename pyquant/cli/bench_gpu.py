"""The GPU side of ``pyquant bench``: runs the benchmark, writes and prints its rows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
import torch

from ..bench.environment import read_environment
from ..bench.gpu import Plan, measure
from ..bench.plot import plot
from ..bench.rows import INCORRECT, ROWS_FILE, Row
from .collect import collect
from .output import print_json, print_table


def add_peers(sites: Sequence[Path], libraries: Sequence[Path]) -> None:
    """Make other libraries importable, and load operator libraries."""
    sys.path[:0] = [str(site) for site in sites]
    for library in libraries:
        torch.ops.load_library(str(library))


def run_gpu(
    plan: Plan, *, csv_path: Path | None, plot_path: Path | None, report_path: Path | None, as_json: bool
) -> None:
    """Measure, write, print; what was measured before an interruption is kept.

    Raises:
        click.exceptions.Exit: 1 when a y of pyquant's is incorrect or a call failed, 130 when interrupted.
    """
    if report_path and not csv_path:
        # The report's own copy: many shapes take long, and a killed process writes no report.
        report_path.mkdir(parents=True, exist_ok=True)
        csv_path = report_path / ROWS_FILE
    found = collect(lambda: measure(plan, read_environment()), Row, plan.cells, csv_path)
    rows = found.rows
    report(rows, plot_path=plot_path, report_path=report_path, as_json=as_json)
    found.raise_early_end()
    if not rows:
        raise click.ClickException("nothing could be measured")
    incorrect = [r for r in rows if r.check == INCORRECT]
    for r in incorrect:
        click.echo(f"Error: {r.label}, M={r.m}, {r.n} x {r.k}: incorrect, relative error {r.error:.2g}", err=True)
    if any(skip.failed for skip in found.skips) or any(r.ours for r in incorrect):
        raise click.exceptions.Exit(1)


def report(rows: Sequence[Row], *, plot_path: Path | None, report_path: Path | None, as_json: bool) -> None:
    """JSON, or a table for each shape; the plot; the report."""
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        for shape in dict.fromkeys((r.n, r.k, r.dtype) for r in rows):
            _print_shape([r for r in rows if (r.n, r.k, r.dtype) == shape])
        if rows:
            click.echo(_environment_line(rows[0]))
    if plot_path and rows:
        plot(rows, plot_path)
        click.echo(f"wrote {plot_path}", err=True)
    if report_path and rows:
        from ..bench.report.write import write_report

        for path in write_report(rows, report_path):
            click.echo(f"wrote {path}", err=True)


def _print_shape(rows: Sequence[Row]) -> None:
    """us of each provider by M, beside the bytes of its weight and their floor."""
    tokens = sorted({r.m for r in rows})
    lines = []
    for label in dict.fromkeys(r.label for r in rows):
        by_m = {r.m: r for r in rows if r.label == label}
        first = next(iter(by_m.values()))
        floor = "" if first.floor_us is None else f"{first.floor_us:.2f}"
        lines.append([label, f"{first.weight_bytes / 1e6:.2f}", floor, *(_cell(by_m.get(m)) for m in tokens)])
    title = f"{rows[0].n} x {rows[0].k}, {rows[0].dtype}: us per call"
    print_table(title, ("provider", "MB", "floor", *(f"M={m}" for m in tokens)), lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    us = f"{row.us:.2f}" if row.us < 100 else f"{row.us:.1f}"
    return us + (" incorrect" if row.check == INCORRECT else "")


def _environment_line(row: Row) -> str:
    clocks = "" if row.sm_clock_mhz is None else f", SM {row.sm_clock_mhz} MHz, memory {row.mem_clock_mhz} MHz"
    versions = f"torch {row.torch}, CUDA {row.cuda}, pyquant {row.pyquant} {row.commit}".rstrip()
    return f"{row.gpu}, driver {row.driver}{clocks}; {versions}; {row.date}"
