"""``pyquant bench --model``: the time of a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import click

from .. import _library
from ..bench.environment import read_cpu_environment, read_environment
from ..bench.model.decoders import PLAIN, choose_code
from ..bench.model.decoding import MODES
from ..bench.model.measure import ModelPlan, measure_model
from ..bench.model.parts import PARTS
from ..bench.model.rows import ModelRow
from ..bench.model.variants import Variant
from ..bench.providers import Unavailable
from ..bench.rows import INCORRECT
from ..profiler.models import CONFIGS
from .collect import collect
from .exits import require_gpu
from .output import print_json, print_table

_HEADINGS = dict(zip(PARTS, ("linear layers", "lm_head", "attention", "norms, rotary, elementwise"), strict=True))


def run_model(
    name: str,
    *,
    device: str,
    variants: Sequence[Variant],
    batches: Sequence[int],
    modes: Sequence[str],
    input_tokens: int,
    output_tokens: int,
    code: str | None,
    layers: int | None,
    verify: bool,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """Measure, write, print; what was measured before an interruption is kept.

    Raises:
        click.exceptions.Exit: 1 when one of pyquant's variants is incorrect or failed, 130 when interrupted.
    """
    if device == "cuda":
        require_gpu("--device cpu runs --model llama-tiny")
    wrong = [mode for mode in modes if mode not in MODES[device]]
    if wrong:
        raise click.UsageError(f"--modes: {wrong[0]} is not for --device {device}")
    try:
        chosen, reason = choose_code(code)
    except Unavailable as error:
        raise click.ClickException(f"--model-code {code}: {error}") from error
    if reason:
        click.echo(f"note: without transformers, so with the model code of --model-code {PLAIN}: {reason}", err=True)
    config = CONFIGS[name]
    plan = ModelPlan(
        name,
        config if layers is None else replace(config, layers=layers),
        chosen,
        device,
        variants,
        batches,
        modes or MODES[device],
        input_tokens,
        output_tokens,
        verify,
    )
    environment = read_environment() if device == "cuda" else read_cpu_environment(_library.device_name("cpu"))
    found = collect(lambda: measure_model(plan, environment), ModelRow, plan.cells, csv_path)
    rows = found.rows
    _report(rows, as_json)
    failed = any(skip.failed for skip in found.skips)
    ours = {variant.label for variant in variants if variant.ours}
    for row in rows:
        where = f"{row.variant}, batch {row.batch}, {row.mode}"
        if row.reason:
            click.echo(f"{where}: failed: {row.reason}", err=True)
        if row.check == INCORRECT:
            click.echo(f"Error: {where}: incorrect, relative error of the logits {row.error:.2g}", err=True)
        failed = failed or (row.variant in ours and (bool(row.reason) or row.check == INCORRECT))
    found.raise_early_end()
    if all(row.tpot_ms is None for row in rows):
        raise click.ClickException("nothing could be measured")
    if failed:
        raise click.exceptions.Exit(1)


def _report(rows: Sequence[ModelRow], as_json: bool) -> None:
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    measured = [row for row in rows if row.tpot_ms is not None]
    for batch in dict.fromkeys(row.batch for row in measured):
        _print_batch([row for row in measured if row.batch == batch])
    _print_memory(measured)
    _print_accelerate(measured)
    if rows:
        r = rows[0]
        click.echo(f"{r.model}, {r.layers} layers, {r.input_tokens} tokens in, {r.output_tokens} out; model code: "
                   f"{r.model_code}; {r.gpu}; torch {r.torch}; pyquant {r.pyquant} {r.commit}".rstrip())  # fmt: skip


def _print_batch(rows: Sequence[ModelRow]) -> None:
    """Times of each variant by mode, and where the time of a token goes."""
    first = rows[0]
    modes = list(dict.fromkeys(row.mode for row in rows))
    where = f"batch {first.batch}"
    cells = {(row.variant, row.mode): row for row in rows}
    variants = list(dict.fromkeys(row.variant for row in rows))
    for title, column, faster in (
        (f"{where}: ms per output token (over bf16)", "tpot_ms", "tpot_speedup"),
        (f"{where}: ms of the prefill (over bf16)", "prefill_ms", "prefill_speedup"),
    ):
        lines = [[v, *(_cell(cells.get((v, mode)), column, faster) for mode in modes)] for v in variants]
        print_table(title, ("linear layers", *modes), lines)
    profiled = [row for row in rows if row.linear_ms is not None]
    columns = [*(f"{part}_ms" for part in PARTS), "gaps_ms", "tpot_ms"]
    lines = [[f"{row.variant}, {row.mode}", *(_number(getattr(row, column)) for column in columns)] for row in profiled]
    if lines:
        headings = ("", *(_HEADINGS[part] for part in PARTS), "gaps", "token")
        print_table(f"{where}: where a token's time goes, ms", headings, lines)


def _print_memory(rows: Sequence[ModelRow]) -> None:
    """Of each variant, where it is known: on a GPU."""
    peaks: dict[tuple[str, int], float] = {}  # of all modes
    for row in rows:
        if row.peak_gb is not None:
            key = row.variant, row.batch
            peaks[key] = max(row.peak_gb, peaks.get(key, 0))
    batches = list(dict.fromkeys(batch for _, batch in peaks))
    weights = {row.variant: row.weights_gb for row in rows if row.weights_gb is not None}
    if weights:
        columns = ("linear layers", "weights", *(f"peak, batch {batch}" for batch in batches))
        lines = [[v, f"{gb:.3f}", *(_number(peaks.get((v, batch))) for batch in batches)] for v, gb in weights.items()]
        print_table("GPU memory, GB (1e9 bytes)", columns, lines)


def _print_accelerate(rows: Sequence[ModelRow]) -> None:
    """What ``pyquant.accelerate`` took."""
    costs = {row.variant: row for row in rows if row.accelerate_s is not None}
    if costs:
        lines = [[v, _number(row.accelerate_s), _number(row.accelerate_peak_gb)] for v, row in costs.items()]
        print_table("pyquant.accelerate", ("linear layers", "seconds", "peak GPU memory, GB"), lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _cell(row: ModelRow | None, column: str, faster: str) -> str:
    if row is None:
        return "failed"
    speedup = getattr(row, faster)
    return f"{getattr(row, column):.3f}" + ("" if speedup is None else f" ({speedup:.2f}x)")
