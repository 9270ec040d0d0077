"""The CPU side of ``pyquant bench``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from ..bench.cpu import Measurement, call_overhead, measure
from ..bench.format_spec import FormatSpec
from ..bench.problem import Problem
from .output import print_json, print_table, progress


def run_overhead(as_json: bool) -> None:
    """The host's cost of a call."""
    figures = {f"{name}_us": round(seconds * 1e6, 2) for name, seconds in call_overhead().items()}
    if as_json:
        print_json(figures)
    else:
        print_table("Cost of a call on a 64 x 64 weight, inference mode", ("call", "us"), list(figures.items()))


def run_cpu(
    problems: Sequence[Problem],
    formats: Sequence[FormatSpec],
    *,
    cold: bool,
    seconds: float,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Measure, write, print."""
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for problem in progress(problems, "measuring"):
        measured = measure(problem, formats, cold=cold, seconds=seconds)
        base = next(m.median for m in measured if m.provider == "F.linear")
        rows += [_row(m, base) for m in measured]
    if csv_path:
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if as_json:
        print_json(rows)
        return
    for problem in problems:
        mine = [r for r in rows if (r["m"], r["n"], r["k"]) == (problem.m, problem.n, problem.k)]
        dtype = str(problem.dtype).removeprefix("torch.")
        title = f"M={problem.m}, {problem.n} x {problem.k}, {dtype}, {torch.get_num_threads()} threads"
        columns = ("provider", "median_ms", "best_ms", "gflops", "speedup_over_f_linear")
        print_table(title, columns, [[r[c] for c in columns] for r in mine])


def _row(m: Measurement, base: float) -> dict[str, object]:
    p = m.problem
    return {
        "provider": m.provider,
        "m": p.m,
        "n": p.n,
        "k": p.k,
        "dtype": str(p.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "median_ms": round(m.median * 1e3, 4),
        "best_ms": round(m.best * 1e3, 4),
        "gflops": round(p.flops / m.median / 1e9, 1),
        "speedup_over_f_linear": round(base / m.median, 2),
    }
