"""``pyquant table``: dispatch tables from measured times, and what to think of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bench.format_spec import FormatSpec
from ..bench.problem import DTYPES
from .extras import require_profile
from .output import print_json, print_table
from .params import Format

if TYPE_CHECKING:
    from ..tables import Table

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_LARGE_M = 2048  # tables that were measured up to here are taken to hold for all M
_JSON = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
_MARGIN = click.option("--margin", type=click.FloatRange(min=0, max=1), default=0.02, show_default=True,
                       help="What a change of instance along M must gain, as a fraction of a call's time.")  # fmt: skip
_PROCESSORS = click.option("--sms", "processors", type=click.IntRange(min=1),
                           help="SMs of the device, where the CSV does not say.")  # fmt: skip


@click.group()
def table() -> None:
    """Dispatch tables: build one from the CSV of `pyquant profile`, look at it, judge it.

    A table says which kernel instance was measured to be the fastest on one device for a weight and M. The library has
    tables built in (profiles/*/table.json); PYQUANT_TABLE=FILE or pyquant.load_table(FILE) puts another in place.

    \b
    Examples:
      pyquant table build profile.csv -o table.json
      pyquant table explain --m 16 --n 4096 --k 4096 --format nf4 --table table.json
      pyquant table score profile.csv --split 0.5
    """
    require_profile("pandas", "jsonschema")


@table.command()
@click.argument("csv_paths", metavar="CSV...", type=_FILE, nargs=-1, required=True)
@click.option("-o", "--output", "output", type=click.Path(dir_okay=False, path_type=Path), required=True)
@_MARGIN
@_PROCESSORS
def build(csv_paths: tuple[Path, ...], output: Path, margin: float, processors: int | None) -> None:
    """Build a table from measured times of one device.

    Of each weight and M the fastest instance, but for changes along M that gain less than the margin. Rows that are
    incorrect, failed or not supported do not count. M between two measured ones is taken for the larger one. From eight
    weights of a GPU on, a cost model is fitted for those that were not measured.
    """
    require_profile("scipy")
    from ..tables.build import build_table
    from ..tables.measurements import read_measurements

    measurements = read_measurements(csv_paths)
    built = build_table(measurements, margin, processors)
    output.write_text(built.to_json(), encoding="utf-8")
    buckets = sum(len(entry.buckets) for entry in built.entries)
    click.echo(
        f"wrote {output}: {built.device}, {len(built.entries)} weights, {buckets} buckets, "
        f"{len(built.instances)} instances; {_models(built)}",
        err=True,
    )
    largest = int(measurements.times["m"].max())
    if largest < _LARGE_M:
        click.echo(f"note: the largest M measured is {largest}; every larger M will run what was best there", err=True)


@table.command()
@click.argument("path", metavar="TABLE", type=_FILE)
@_JSON
def show(path: Path, as_json: bool) -> None:
    """Print a table: its buckets of M, and where it comes from."""
    from ..tables import read_table

    shown = read_table(path)
    if as_json:
        print_json(asdict(shown))
        return
    rows: list[tuple[object, ...]] = []
    for e in shown.entries:
        for b in e.buckets:
            key = (f"{e.n} x {e.k}", e.encoding, e.dtype, e.group_size or "K")
            rows.append((*key, b.range, b.instance, b.gemm or ""))
    columns = ("N x K", "encoding", "dtype", "group", "M", "instance", "without a dense GEMM")
    print_table(shown.device, columns, rows)
    click.echo(f"SMs (CPU: threads): {shown.processors or 'unknown'}")
    click.echo(_models(shown))
    for name, value in shown.provenance.items():
        click.echo(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


@table.command()
@click.option("--m", type=click.IntRange(min=1), required=True, help="Tokens.")
@click.option("--n", type=click.IntRange(min=1), required=True, help="out_features.")
@click.option("--k", type=click.IntRange(min=1), required=True, help="in_features.")
@click.option("--format", "spec", type=Format(), default="nf4", show_default=True, help="name[-gN][-nested].")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of x and y.")
@click.option("--table", "path", type=_FILE, help="This table; default: those in use, for --device.")
@click.option("--device", help="Name of the GPU or CPU; default: the one of this machine.")
@click.option("--sms", "processors", type=click.IntRange(min=1),
              help="SMs of a GPU --device that has no table: what a cost model predicts for it.")  # fmt: skip
@_JSON
def explain(
    m: int,
    n: int,
    k: int,
    spec: FormatSpec,
    dtype: str,
    path: Path | None,
    device: str | None,
    processors: int | None,
    as_json: bool,
) -> None:
    """Say what would run, and which measured weight that is taken from, or that it is predicted.

    Exit code 1 if the table says nothing: then the rule of the dispatch decides.
    """
    from ..formats import FORMATS
    from ..tables import read_table
    from ..tables.encoding import encoding_name
    from ..tables.lookup import Lookup

    if path and device:
        raise click.UsageError("--device has no meaning with --table: a table is for one device")
    if processors and not device:
        raise click.UsageError("--sms is for --device")
    fmt = FORMATS[spec.name]
    asked = fmt.group_size if spec.group_size is None else spec.group_size
    group_size = 0 if asked <= 0 or asked >= k else asked
    shown = read_table(path) if path else None
    name = shown.device if shown else device or _this_device()
    encoding = encoding_name(spec, group_size or k, k)
    lookup = Lookup(shown, name, processors or (0 if path or device else _processors()))
    choice = lookup.find(encoding, dtype, group_size, n, k, m)
    if choice is None:
        raise click.ClickException(f"no table for {name} has {encoding} with {dtype}; the dispatch's rule decides")
    exact = not choice.predicted and (choice.n, choice.k, choice.group_size) == (n, k, group_size)
    report: dict[str, Any] = {
        "device": name,
        "instance": choice.bucket.instance,
        "without_dense_gemm": choice.bucket.gemm,
        "bucket": choice.bucket.range,
        "nearest": {"n": choice.n, "k": choice.k, "group_size": choice.group_size or "K"},
        "measured": exact,
        "predicted": choice.predicted,
    }
    if as_json:
        print_json(report)
        return
    group = f"g{choice.group_size or 'K'}"
    weight = f"{encoding}, {dtype}, {group}, {choice.n} x {choice.k}"
    click.echo(choice.bucket.instance)
    if choice.bucket.gemm:
        click.echo(f"without a dense GEMM: {choice.bucket.gemm}")
    how = "measured" if exact else "predicted for" if choice.predicted else "the nearest measured weight is"
    source = f"{name}, {processors} SMs" if processors else f"table of {name}"
    click.echo(f"{source}: {how} {weight}, M = {choice.bucket.range}")


def _models(shown: Table) -> str:
    return f"cost models: {', '.join(model.encoding for model in shown.models) or 'none'}"


def _processors() -> int:
    """SMs of this machine's GPU; 0: it has none."""
    import torch

    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 0


def _this_device() -> str:
    import torch

    from .. import _library

    return _library.device_name("cuda" if torch.cuda.is_available() and _library.has_cuda() else "cpu")


@table.command()
@click.argument("old", type=_FILE)
@click.argument("new", type=_FILE)
@_JSON
def diff(old: Path, new: Path, as_json: bool) -> None:
    """Print where two tables choose differently. Exit code 1 if they do.

    Tables of two devices are compared too; a note on stderr names the devices.
    """
    from ..tables import read_table
    from ..tables.diff import changes

    of_old, of_new = read_table(old), read_table(new)
    if of_old.device != of_new.device:
        click.echo(
            f"note: of different devices, which may well choose differently: {old} is for {of_old.device}, "
            f"{new} for {of_new.device}",
            err=True,
        )
    if of_old.models != of_new.models:
        click.echo("note: their cost models differ; weights that neither has measured may run something else", err=True)
    found = list(changes(of_old, of_new))
    if as_json:
        key = ("encoding", "dtype", "group_size", "n", "k")
        print_json([
            {**{name: getattr(c.entry, name) for name in key}, "m": c.range, "old": c.old, "new": c.new} for c in found
        ])  # fmt: skip
    elif found:
        rows = [(str(c.entry), c.range, c.old or "none", c.new or "none") for c in found]
        print_table(f"{old} and {new}", ("weight", "M", "old", "new"), rows)
    else:
        click.echo("the tables choose the same everywhere")
    if found:
        raise click.exceptions.Exit(1)


@table.command()
@click.argument("path", metavar="TABLE", type=_FILE)
@click.argument("csv_paths", metavar="[CSV]...", type=_FILE, nargs=-1)
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True,
              help="A choice slower than the best by more than this fraction is a regression.")  # fmt: skip
def check(path: Path, csv_paths: tuple[Path, ...], tolerance: float) -> None:
    """Check a table: its form, that its buckets cover all M, that its instances exist; and with CSV files that no
    choice is slower than the best one measured. Exit code 1 if anything is wrong.
    """
    from ..tables import read_table
    from ..tables.check import problems_of
    from ..tables.measurements import read_measurements

    checked = read_table(path)
    measurements = read_measurements(csv_paths) if csv_paths else None
    problems = list(problems_of(checked, measurements, tolerance))
    for problem in problems:
        click.echo(f"{path}: {problem}", err=True)
    if problems:
        raise click.ClickException(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}")
    click.echo(f"{path}: {len(checked.entries)} weights, all is well")


@table.command()
@click.argument("csv_paths", metavar="CSV...", type=_FILE, nargs=-1, required=True)
@click.option("--table", "path", type=_FILE, help="Score this table; default: one built from the CSV.")
@click.option("--split", type=click.FloatRange(0, 1, min_open=True, max_open=True),
              help="Build from this share of the shapes, score on the others.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Of the split.")
@click.option("--fallback", default="*_dequant*", show_default=True, metavar="GLOB",
              help="Instances that a choice must not be slower than.")  # fmt: skip
@_MARGIN
@_PROCESSORS
@_JSON
def score(
    csv_paths: tuple[Path, ...],
    path: Path | None,
    split: float | None,
    seed: int,
    fallback: str,
    margin: float,
    processors: int | None,
    as_json: bool,
) -> None:
    """Say how good the choices are over all measured (weight, M).

    ideal: within 5% of the best instance; regressive: slower than the fallback, dequantize + dense GEMM.
    """
    from ..tables import read_table
    from ..tables.build import build_table
    from ..tables.lookup import Lookup
    from ..tables.measurements import read_measurements
    from ..tables.score import cells, score_cells, score_split

    if path is None:
        require_profile("scipy")
    if path and split:
        raise click.UsageError("--split has no meaning with --table: it builds its own")
    measurements = read_measurements(csv_paths)
    if split:
        result = score_split(
            measurements, split, seed, margin=margin, processors=processors, fallback=fallback
        )  # fmt: skip
    else:
        scored = read_table(path) if path else build_table(measurements, margin, processors)
        if scored.device != measurements.device:
            raise click.ClickException(f"{path}: the table is for {scored.device}, the CSV of {measurements.device}")
        result = score_cells(list(cells(Lookup(scored), measurements, fallback)))
    if as_json:
        print_json(asdict(result))
        return
    rows = [
        ("measured (weight, M)", result.cells),
        ("without a measured choice", result.unknown),
        ("ideal: within 5% of the best", _percent(result.ideal)),
        (f"regressive: slower than {fallback}", _percent(result.regressive)),
        ("mean loss", _percent(result.mean_loss)),
        ("worst loss", _percent(result.worst_loss)),
    ]
    print_table(measurements.device, ("", ""), rows)
    if result.worst is not None and result.worst.loss > 0:
        w = result.worst
        click.echo(f"worst: {w.where}, M={w.m}: {w.choice} {w.us:.2f} us, {w.best} {w.best_us:.2f} us")


def _percent(value: float | None) -> str:
    return "none measured" if value is None else f"{100 * value:.2f}%"
