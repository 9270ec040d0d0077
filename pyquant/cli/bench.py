"""``pyquant bench``: GEMM times on this machine, on the CPU beside torch's own, on a GPU beside other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from ..bench.format_spec import FormatSpec, parse_format_spec
from ..bench.model.decoders import MODEL_CODES
from ..bench.model.decoding import MODES
from ..bench.problem import DTYPES, Problem
from ..bench.providers import DEFAULT_NAMES, NAMES
from ..bench.shapes_file import read_shapes
from ..profiler.models import CONFIGS
from .extras import require_profile
from .params import CommaList, Format, ModelVariant, Shape, flatten

_SHAPES = [(4096, 4096)]
_TOKENS = {"cpu": [1, 4, 16, 64, 256], "cuda": [1, 2, 4, 8, 16, 32, 64, 128, 256],
           "report": [2**i for i in range(14)]}  # fmt: skip
_FORMATS = {"cpu": ("nf4", "nf4-nested", "int4"), "cuda": ("nf4", "nf4-nested", "int4-g128"),
            "report": ("nf4", "int4-g128")}  # fmt: skip
# Options that decide the device if --device does not.
_CPU_ONLY = ("threads", "seconds", "overhead")
_GPU_ONLY = ("provider_names", "instances", "pdl", "do_bench", "sites", "libraries", "plot_path",
             "report_path")  # fmt: skip
_MODEL_ONLY = ("batch_lists", "input_tokens", "output_tokens", "variant_lists", "mode_lists", "model_code", "layers",
               "verify")  # fmt: skip
_MODELS = [name for name, config in CONFIGS.items() if config.gated]
_BATCHES = [1, 4, 16, 64]
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="cuda if there is a GPU, else cpu.")
@click.option("--shape", "shape_lists", type=CommaList(Shape()), multiple=True,
              help="N x K of the weight; repeatable. Default: 4096x4096.")  # fmt: skip
@click.option("--shapes", "shapes_file", type=_FILE,
              help='JSON: {"models": {name: [[N, K], ...]}}; its "m" is the default of --m.')  # fmt: skip
@click.option("--m", "token_lists", type=CommaList(click.IntRange(min=1)), multiple=True,
              help="Tokens; repeatable. Default: 1 to 256.")  # fmt: skip
@click.option("--format", "format_lists", type=CommaList(Format()), multiple=True,
              help="name[-gN][-nested], such as nf4, int4-g128, nf4-nested; repeatable. "
              "Default: nf4, nf4-nested and int4, on a GPU int4-g128.")  # fmt: skip
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True, help="Of x and y.")
@click.option("--hot", is_flag=True, help="Use one copy of the weight, so that it may stay in the cache.")
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the rows here.")
@click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU: threads; torch's default if not given.")
@click.option("--seconds", type=click.FloatRange(min=0.05), default=1.0, show_default=True,
              help="CPU: time for each provider of each row.")  # fmt: skip
@click.option("--overhead", is_flag=True, help="CPU: measure the host's cost of a call instead.")
@click.option("--provider", "provider_names", type=CommaList(click.Choice([*NAMES, "all"])), multiple=True,
              metavar="NAME[,...]", help=f"GPU: who is measured: {', '.join(NAMES)}, or all; repeatable. Default: "
              "all but those that compile or tune for seconds.")  # fmt: skip
@click.option("--instances", is_flag=True, help="GPU: measure every kernel instance of pyquant's.")
@click.option("--pdl", is_flag=True, help="GPU: measure pyquant with programmatic dependent launch as well.")
@click.option("--do-bench", is_flag=True, help="GPU: also report triton.testing.do_bench.")
@click.option("--site", "sites", type=click.Path(exists=True, file_okay=False, path_type=Path), multiple=True,
              help="GPU: a folder with other libraries' packages; repeatable.")  # fmt: skip
@click.option("--load-library", "libraries", type=_FILE, multiple=True,
              help="GPU: an operator library to load, such as vLLM's _C; repeatable.")  # fmt: skip
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path),
              help="GPU: draw the rows into this file (.png, .svg, .pdf).")  # fmt: skip
@click.option("--report", "report_path", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="GPU: a page with interactive plots, pictures and the rows, into this folder. Without shapes: the "
              "layers of llama-3.1-8b and neighbours of N at powers of two, M to 8192.")  # fmt: skip
@click.option("--from-csv", "from_csvs", type=_FILE, multiple=True,
              help="Measure nothing; print, plot and report the rows of this file of --csv; repeatable.")  # fmt: skip
@click.option("--model", type=click.Choice(_MODELS, case_sensitive=False),
              help="Time a whole model with random weights instead of single GEMMs.")  # fmt: skip
@click.option("--batch", "batch_lists", type=CommaList(click.IntRange(min=1)), multiple=True,
              help="Model: sequences; repeatable. Default: 1, 4, 16, 64.")  # fmt: skip
@click.option("--input", "input_tokens", type=click.IntRange(min=1), default=128, show_default=True,
              help="Model: tokens of a prompt.")  # fmt: skip
@click.option("--output", "output_tokens", type=click.IntRange(min=2), default=128, show_default=True,
              help="Model: tokens that follow.")  # fmt: skip
@click.option("--variants", "variant_lists", type=CommaList(ModelVariant()), multiple=True, metavar="NAME[,...]",
              help="Model: whose linear layers: bf16, a format, or a peer's name; repeatable. "
              "Default: bf16, bnb_nf4, bnb_nf4-accelerated, marlin, machete, humming, nf4, int4-g128.")  # fmt: skip
@click.option("--modes", "mode_lists", type=CommaList(click.Choice(MODES["cuda"])), multiple=True, metavar="NAME[,...]",
              help=f"Model: {', '.join(MODES['cuda'])}; repeatable. Default: all.")  # fmt: skip
@click.option("--model-code", type=click.Choice(MODEL_CODES),
              help="Model: transformers' Llama (default, if it can be imported), or one in plain torch with joined "
              "projections.")  # fmt: skip
@click.option("--layers", type=click.IntRange(min=1), help="Model: so many blocks instead of the model's.")
@click.option("--verify/--no-verify", default=True, show_default=True,
              help="Model: compare the logits with those of the dequantized weights.")  # fmt: skip
@click.pass_context
def bench(
    ctx: click.Context,
    device: str | None,
    shape_lists: tuple[tuple[tuple[int, int], ...], ...],
    shapes_file: Path | None,
    token_lists: tuple[tuple[int, ...], ...],
    format_lists: tuple[tuple[FormatSpec, ...], ...],
    dtype: str,
    hot: bool,
    csv_path: Path | None,
    as_json: bool,
    threads: int | None,
    seconds: float,
    overhead: bool,
    provider_names: tuple[tuple[str, ...], ...],
    instances: bool,
    pdl: bool,
    do_bench: bool,
    sites: tuple[Path, ...],
    libraries: tuple[Path, ...],
    plot_path: Path | None,
    report_path: Path | None,
    from_csvs: tuple[Path, ...],
    model: str | None,
    batch_lists: tuple[tuple[int, ...], ...],
    input_tokens: int,
    output_tokens: int,
    variant_lists: tuple[tuple[Any, ...], ...],
    mode_lists: tuple[tuple[str, ...], ...],
    model_code: str | None,
    layers: int | None,
    verify: bool,
) -> None:
    """Time y = x @ W^T.

    On the CPU: pyquant's formats, F.linear on the dequantized weight, dequantize + F.linear, and torch's int4pack
    kernel, in turns on the same data.

    On a GPU: in CUDA graphs, every call on another copy of the weight (cold L2), pyquant's formats beside cuBLAS,
    other libraries where they are installed, and the time that only reading the weight takes (the floor). Every y
    of pyquant's is checked; exit code 1 if one is incorrect. docs/performance.md says what the columns mean.

    A whole model (--model): time of a prefill and of an output token, eager, in CUDA graphs and compiled, and where
    that time goes; exit code 3 without a GPU. docs/benchmarking.md.

    \b
    Examples:
      pyquant bench
      pyquant bench --shape 4096x14336 --m 1 --m 64 --dtype fp32 --threads 1
      pyquant bench --overhead
      pyquant bench --device cuda --shape 4096x4096,8192x8192 --m 1,2,4,8,16 --csv h200.csv --plot h200.png
      pyquant bench --from-csv h200.csv --plot h200.png
      pyquant bench --report out/
      pyquant bench --from-csv h200.csv --report out/
      pyquant bench --model llama-3.1-8b --batch 1,4,16,64 --input 128 --output 128 --csv model.csv
    """
    if from_csvs:
        _only(ctx, "from_csvs", ("plot_path", "report_path", "as_json"))
        _print_files(from_csvs, plot_path, report_path, as_json)
        return
    if model:
        _only(ctx, "model", (*_MODEL_ONLY, "device", "csv_path", "as_json", "sites", "libraries"))
        from ..bench.model.variants import DEFAULT, parse_variant
        from .bench_gpu import add_peers
        from .bench_model import run_model

        _require_folder_of(ctx, csv_path)
        add_peers(sites, libraries)
        run_model(
            model.lower(),
            device=device or "cuda",
            variants=flatten(variant_lists) or [parse_variant(name) for name in DEFAULT],
            batches=flatten(batch_lists) or _BATCHES,
            modes=flatten(mode_lists),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            code=model_code,
            layers=layers,
            verify=verify,
            csv_path=csv_path,
            as_json=as_json,
        )
        return
    if of_model := _given(ctx, _MODEL_ONLY):
        raise click.UsageError(f"{of_model[0]} needs --model", ctx)
    device = _device(ctx, device)
    if overhead:
        from .bench_cpu import run_overhead

        _set_threads(threads)
        run_overhead(as_json)
        return
    shapes, file_tokens = read_shapes(shapes_file) if shapes_file else ([], [])
    kind = "report" if report_path else device
    shapes = list(dict.fromkeys([*flatten(shape_lists), *shapes])) or (_report_shapes() if report_path else _SHAPES)
    tokens = flatten(token_lists) or file_tokens or _TOKENS[kind]
    formats = flatten(format_lists) or [parse_format_spec(text) for text in _FORMATS[kind]]
    _require_folder_of(ctx, csv_path)
    if device == "cpu":
        from .bench_cpu import run_cpu

        _set_threads(threads)
        problems = [Problem(m, n, k, DTYPES[dtype]) for n, k in shapes for m in tokens]
        run_cpu(problems, formats, cold=not hot, seconds=seconds, csv_path=csv_path, as_json=as_json)
        return
    from ..bench.gpu import Plan
    from ..bench.providers import Unavailable, select
    from ..bench.report.sweep import CUBLAS
    from .bench_gpu import add_peers, run_gpu

    _require_plots(plot_path, report_path)
    add_peers(sites, libraries)
    names = flatten(provider_names) or list(DEFAULT_NAMES)
    names = list(NAMES) if "all" in names else names
    if report_path and CUBLAS not in names:
        raise click.UsageError(f"--report compares with {CUBLAS}: expected it in --provider", ctx)
    try:
        providers = select(names, formats, dtype, instances=instances, pdl=pdl)
    except Unavailable as error:
        raise click.ClickException(f"--instances: {error}") from error
    plan = Plan(shapes, tokens, DTYPES[dtype], providers, cold=not hot, do_bench=do_bench)
    run_gpu(plan, csv_path=csv_path, plot_path=plot_path, report_path=report_path, as_json=as_json)


def _report_shapes() -> list[tuple[int, int]]:
    from ..bench.report.outliers import with_neighbours

    return with_neighbours(list(CONFIGS["llama-3.1-8b"].shapes()))


def _require_folder_of(ctx: click.Context, csv_path: Path | None) -> None:
    if csv_path and not csv_path.absolute().parent.is_dir():
        raise click.BadParameter(f"{csv_path.parent}: expected a folder", ctx, param_hint="--csv")


def _print_files(paths: Sequence[Path], plot_path: Path | None, report_path: Path | None, as_json: bool) -> None:
    from ..bench.rows import read_csv
    from .bench_gpu import report

    _require_plots(plot_path, report_path)
    rows = [row for path in paths for row in read_csv(path)]
    report(rows, plot_path=plot_path, report_path=report_path, as_json=as_json)


def _require_plots(plot_path: Path | None, report_path: Path | None) -> None:
    """Before a measurement, not after."""
    if plot_path:
        from ..bench.plot import require_matplotlib

        require_matplotlib()
    if report_path:
        require_profile("pandas", "plotly", "matplotlib")


def _set_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)


def _device(ctx: click.Context, asked: str | None) -> str:
    """Where to measure.

    Raises:
        click.UsageError: when options contradict each other, or there is no GPU for them.
    """
    of_cpu, of_gpu = _given(ctx, _CPU_ONLY), _given(ctx, _GPU_ONLY)
    if of_cpu and of_gpu:
        raise click.UsageError(f"{of_cpu[0]} is for the CPU, {of_gpu[0]} for a GPU", ctx)
    device = asked or ("cpu" if of_cpu else "cuda" if of_gpu or torch.cuda.is_available() else "cpu")
    wrong = of_gpu if device == "cpu" else of_cpu
    if wrong:
        raise click.UsageError(f"{wrong[0]} is not for --device {device}", ctx)
    if device == "cuda" and not torch.cuda.is_available():
        reason = "is built without CUDA" if torch.version.cuda is None else "finds none"
        who = "--device cuda" if asked else of_gpu[0]
        raise click.UsageError(f"{who} needs an NVIDIA GPU, and this torch {reason}", ctx)
    return device


def _only(ctx: click.Context, option: str, allowed: tuple[str, ...]) -> None:
    """Raise UsageError if options other than ``option`` and ``allowed`` were given."""
    others = _given(ctx, tuple(name for name in ctx.params if name not in (option, *allowed)))
    if others:
        raise click.UsageError(f"{others[0]} has no meaning with {_flag(ctx, option)}", ctx)


def _given(ctx: click.Context, names: tuple[str, ...]) -> list[str]:
    """The flags of those parameters that were given on the command line."""
    given = [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [_flag(ctx, name) for name in given]


def _flag(ctx: click.Context, name: str) -> str:
    return next(p.opts[0] for p in ctx.command.params if p.name == name)
