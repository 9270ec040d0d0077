"""``pyquant profile``: every kernel instance on every problem, for dispatch tables."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bench.format_spec import FormatSpec
from ..bench.problem import DTYPES
from ..bench.rows import INCORRECT
from ..bench.shapes_file import read_shapes
from ..formats import FORMATS, ScaleType
from ..profiler.models import CONFIGS
from ..profiler.rows import FAILED, ProfileRow, open_profile
from .exits import INTERRUPTED, require_gpu
from .extras import require_profile
from .output import print_table, progress
from .params import CommaList, Format, IntRanges, flatten

if TYPE_CHECKING:
    from ..profiler.measure import Profiler
    from ..profiler.plan import Case

_TOKENS = tuple(2**i for i in range(14))
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--kernels", "globs", type=CommaList(click.STRING), multiple=True, metavar="GLOB[,...]",
              help="Instances by name, with or without the device, of an encoding or a format: 'stream_*', '*nf4*'. "
              "Default: all.")  # fmt: skip
@click.option("--m", "tokens", type=IntRanges(),
              help="Tokens: values and ranges start:end:step, the end included. "
              f"Default: {', '.join(map(str, _TOKENS))}.")  # fmt: skip
@click.option("--n", "ns", type=IntRanges(), help="out_features, each with each of --k.")
@click.option("--k", "ks", type=IntRanges(), help="in_features.")
@click.option(
    "--shapes",
    "shapes_file",
    type=_FILE,
    help='JSON: {"models": {name: [[N, K], ...]}}; its "m" is the default of --m.',
)
@click.option("--model", "models", type=click.Choice(list(CONFIGS), case_sensitive=False), multiple=True,
              help="The linear layers of a public model; repeatable.")  # fmt: skip
@click.option("--formats", "format_lists", type=CommaList(Format()), multiple=True,
              help="name[-gN][-nested]; repeatable. Default: nf4, int4-g128.")  # fmt: skip
@click.option("--group-size", "group_sizes", type=IntRanges(),
              help="Group sizes of the formats that are written without one.")  # fmt: skip
@click.option("--nested", is_flag=True, help="Nested absmax for the formats that have it.")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of x and y.")
@click.option("--bias", is_flag=True, help="With a bias.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare y with the dequantized weight's.")
@click.option("--cold/--hot", default=True, show_default=True,
              help="Every call on another copy of the weight, or all on one.")  # fmt: skip
@click.option("--graph/--stream", default=True, show_default=True,
              help="GPU: calls in a CUDA graph, or launched one by one.")  # fmt: skip
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Stop after this long.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="Add each row to this file.")
@click.option("--append", is_flag=True, help="Go on with the file of --csv: what it has is not measured again.")
def profile(
    device: str,
    globs: tuple[tuple[str, ...], ...],
    tokens: tuple[int, ...] | None,
    ns: tuple[int, ...] | None,
    ks: tuple[int, ...] | None,
    shapes_file: Path | None,
    models: tuple[str, ...],
    format_lists: tuple[tuple[FormatSpec, ...], ...],
    group_sizes: tuple[int, ...] | None,
    nested: bool,
    dtype: str,
    bias: bool,
    verify: bool,
    cold: bool,
    graph: bool,
    budget: float | None,
    csv_path: Path | None,
    append: bool,
) -> None:
    """Time kernel instances on this machine: each on every format, shape and M. docs/profiling.md.

    Each row of the CSV says whether the instance passed, was incorrect, is not supported there, or failed, and the
    command that measures it again. Ctrl-C and --budget keep what was measured; --append goes on from there.

    Exit codes: 0 all well; 1 nothing matched, or a row is incorrect or failed; 2 wrong usage; 3 no GPU; 130
    interrupted.

    \b
    Examples:
      pyquant profile --model llama-3.1-8b --csv profile.csv
      pyquant profile --kernels 'stream_*' --m 1,16:128:16 --n 4096 --k 4096,14336 --formats nf4 --csv profile.csv
      pyquant profile --model llama-3.1-8b --csv profile.csv --append --budget 600
    """
    if device == "cuda":
        require_gpu("--device cpu profiles the CPU")
    require_profile("pandas")  # before the measurement, not after
    from ..bench.gpu import BrokenDevice
    from ..profiler.measure import Profiler
    from ..profiler.plan import Setting, cases, instances_of

    file_shapes, file_tokens = read_shapes(shapes_file) if shapes_file else ([], [])
    shapes = _shapes(ns, ks, file_shapes, models)
    tokens = tokens or tuple(file_tokens) or _TOKENS
    specs = _specs(flatten(format_lists), group_sizes or (), nested)
    if append and csv_path is None:
        raise click.UsageError("--append needs --csv")
    if csv_path is not None and csv_path.exists() and not append:
        raise click.UsageError(f"{csv_path} is there already: --append goes on with it")
    instances = instances_of(device, flatten(globs))
    if not instances:
        names = ", ".join(name for _, name, _ in instances_of(device, [])) or "none"
        raise click.ClickException(f"no instance matches --kernels; those that run on {device} here: {names}")
    launch = "host" if device == "cpu" else "graph" if graph else "stream"
    setting = Setting(device, dtype, bias, "cold" if cold else "hot", launch, verify)
    profiler = Profiler(setting)
    todo = list(cases(shapes, specs, tokens, instances))
    with ExitStack() as stack:
        file = stack.enter_context(open_profile(csv_path, profiler.device_name)) if csv_path else None
        if file:
            todo = [case for case in todo if case.key(setting) not in file.done]
        run = _Run(profiler, budget)
        try:
            for row in run.rows(todo):
                if file:
                    file.write(row)
        except KeyboardInterrupt:
            run.end, run.exit_code = "interrupted", INTERRUPTED
        except BrokenDevice as error:
            run.end, run.exit_code = str(error), 1
    run.report(len(todo), csv_path)


class _Run:
    """The rows of one run, however it ends."""

    def __init__(self, profiler: Profiler, budget: float | None) -> None:
        self.profiler, self.budget = profiler, budget
        self.measured: list[ProfileRow] = []
        self.end = ""
        self.exit_code = 0

    def rows(self, todo: Sequence[Case]) -> Iterator[ProfileRow]:
        start = time.monotonic()
        within = itertools.takewhile(lambda _: self._has_time(start), todo)
        for row in progress(self.profiler.measure(within), "measuring", len(todo)):
            self.measured.append(row)
            yield row

    def _has_time(self, start: float) -> bool:
        if self.budget is None or time.monotonic() - start < self.budget:
            return True
        self.end = f"the budget of {self.budget:g} s is spent"
        return False

    def report(self, wanted: int, csv_path: Path | None) -> None:
        """A table of the fastest, what became of the rows, and the exit code."""
        _print_fastest(self.measured)
        counts = Counter(row.disposition for row in self.measured)
        summary = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing left to measure"
        click.echo(f"{summary}{f'; rows in {csv_path}' if csv_path else ''}", err=True)
        for row in self.measured:
            if row.disposition in (INCORRECT, FAILED):
                click.echo(f"Error: {row.disposition}: {row.reason or f'relative error {row.error}'}: {row.command}",
                           err=True)  # fmt: skip
        if self.end:
            click.echo(f"{self.end}: {len(self.measured)} of {wanted} cases were measured", err=True)
        code = self.exit_code
        if not code and (counts[INCORRECT] or counts[FAILED]):
            code = 1
        if not code and self.measured and not any(row.us is not None for row in self.measured):
            click.echo("Error: no instance supports any of the problems", err=True)
            code = 1
        if code:
            raise click.exceptions.Exit(code)


def _print_fastest(measured: Sequence[ProfileRow]) -> None:
    best: dict[tuple[object, ...], tuple[float, str]] = {}
    for row in measured:
        if row.us is not None and row.disposition != INCORRECT:
            key = (f"{row.n} x {row.k}", row.format, row.m)
            best[key] = min(best.get(key, (math.inf, "")), (row.us, row.instance))
    lines = [(*key, name, f"{us:.2f}") for key, (us, name) in best.items()]
    if lines:
        print_table("fastest instances", ("N x K", "format", "M", "instance", "us"), lines)


def _shapes(
    ns: tuple[int, ...] | None,
    ks: tuple[int, ...] | None,
    file_shapes: Sequence[tuple[int, int]],
    models: tuple[str, ...],
) -> list[tuple[int, int]]:
    if (ns is None) != (ks is None):
        raise click.UsageError("--n and --k need each other")
    shapes = list(itertools.product(ns or (), ks or ()))
    shapes += file_shapes
    shapes += [shape for model in models for shape in CONFIGS[model.lower()].shapes()]
    if not shapes:
        raise click.UsageError("which weights? --n and --k, --shapes or --model")
    return list(dict.fromkeys(shapes))


def _specs(specs: list[FormatSpec], group_sizes: tuple[int, ...], nested: bool) -> list[FormatSpec]:
    """The formats with the group sizes and the nested absmax that were asked for."""
    chosen = []
    for spec in specs or [FormatSpec("nf4"), FormatSpec("int4", 128)]:
        if nested and ScaleType.NESTED in FORMATS[spec.name].scale_types:
            spec = replace(spec, nested=True)
        chosen += (
            [replace(spec, group_size=g) for g in group_sizes] if spec.group_size is None and group_sizes else [spec]
        )
    return list(dict.fromkeys(chosen))
