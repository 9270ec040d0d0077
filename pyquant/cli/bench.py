"""``pyquant bench``: GEMM times on this machine, beside torch's own."""

from __future__ import annotations

import csv
from pathlib import Path

import click
import torch

from ..bench import Measurement, Problem, measure, operator_overhead
from .output import print_json, print_table, progress

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Shape(click.ParamType):
    name = "NxK"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        n, _, k = str(value).partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0):
            self.fail(f"expected NxK such as 4096x4096, got {value!r}", param, ctx)
        return int(n), int(k)


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


@click.command()
@click.option("--shape", "shapes", type=_Shape(), multiple=True, default=("4096x4096",), show_default=True,
              help="N x K of the weight; repeatable.")  # fmt: skip
@click.option("--m", "tokens", type=click.IntRange(min=1), multiple=True, default=(1, 4, 16, 64, 256),
              show_default=True, help="Tokens; repeatable.")  # fmt: skip
@click.option("--format", "formats", multiple=True, default=("nf4", "nf4-nested", "int4"), show_default=True,
              help="A format name, or one with -nested; repeatable.")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bf16", show_default=True, help="Of x and y.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; torch's default if not given.")
@click.option("--hot", is_flag=True, help="Use one copy of the weight, so that it may stay in the cache.")
@click.option("--seconds", type=click.FloatRange(min=0.05), default=1.0, show_default=True,
              help="Time for each provider of each row.")  # fmt: skip
@click.option("--overhead", is_flag=True, help="Measure the host's cost of a call instead.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
def bench(
    shapes: tuple[tuple[int, int], ...],
    tokens: tuple[int, ...],
    formats: tuple[str, ...],
    dtype: str,
    threads: int | None,
    hot: bool,
    seconds: float,
    overhead: bool,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Time y = x @ W^T on the CPU: pyquant's formats, F.linear on the dequantized weight, dequantize + F.linear,
    and torch's int4pack kernel, in turns on the same data.

    \b
    Examples:
      pyquant bench
      pyquant bench --shape 4096x14336 --m 1 --m 64 --dtype fp32 --threads 1
      pyquant bench --overhead
    """
    if threads:
        torch.set_num_threads(threads)
    if overhead:
        ours, torchs = operator_overhead()
        figures = {"pyquant.linear_us": round(ours * 1e6, 2), "F.linear_us": round(torchs * 1e6, 2)}
        if as_json:
            print_json(figures)
        else:
            print_table("Cost of a call on a 64 x 64 weight", ("call", "us"), list(figures.items()))
        return
    torch.manual_seed(0)
    problems = [Problem(m, n, k, _DTYPES[dtype]) for n, k in shapes for m in tokens]
    rows: list[dict[str, object]] = []
    for problem in progress(problems, "measuring"):
        measured = measure(problem, formats, cold=not hot, seconds=seconds)
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
        title = f"M={problem.m}, {problem.n} x {problem.k}, {dtype}, {torch.get_num_threads()} threads"
        columns = ("provider", "median_ms", "best_ms", "gflops", "speedup_over_f_linear")
        print_table(title, columns, [[r[c] for c in columns] for r in mine])
