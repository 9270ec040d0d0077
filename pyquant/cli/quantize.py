"""``pyquant quantize``: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ..checkpoint import Reader, StoredTensor, replace_file, save
from ..formats import FORMATS, ScaleType, ZeroType
from ..quantize import check_settings
from ..quantize import quantize as quantize_weight
from ..weight import QuantizedWeight
from . import output
from .model_files import INDEX_FILE, Model, read_config, write_config, written_modules
from .output_folder import check_other_weights, check_target, replace_folder
from .selection import DEFAULT_EXCLUDES, Selection

# Formats without a codebook of their own need values that the command line does not carry.
_FORMATS = [name for name, row in FORMATS.items() if not row.needs_codebook]
# Weights in other forms, which a quantized model folder does not repeat.
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack")

_HELP = f"""Quantize the linear layers of a checkpoint.

    IN is a .safetensors file, or a model folder with model.safetensors or shards and their index. OUT is a
    file or a folder accordingly; a folder also gets the other files of the model (config, tokenizer), and
    keeps the shards. Its config.json gets a quantization_config, by which transformers loads the folder after
    `import pyquant.hf`.

    Quantized are 2-D fp32, fp16 or bf16 tensors called *.weight, except those whose names look like
    embeddings, norms, the output head or routers of experts. --include replaces this default by the globs
    given; --exclude always wins. All other tensors are copied as they are. The names:
    {", ".join(DEFAULT_EXCLUDES)}.

    OUT is complete or not written at all. --json prints: input, output, format, dry_run, layers (name,
    shape, bytes, quantized_bytes, bits_per_weight), copied (number of tensors), bytes and quantized_bytes
    (of the safetensors files). A dry run has null where it would need to quantize.

    \b
    Examples:
      pyquant quantize model.safetensors model-nf4.safetensors --format nf4 --nested
      pyquant quantize ./llama ./llama-int4 --format int4 --group-size 128
      pyquant quantize model.safetensors out.safetensors --format uint4 --method hqq --include '*.mlp.*'
      pyquant quantize model.safetensors out.safetensors --exclude '*.layers.0.*' --dry-run
    """


_QuantizeLayer = Callable[[str, torch.Tensor], QuantizedWeight]


@dataclass
class _Layer:
    """What became of one weight."""

    name: str
    shape: list[int]
    bytes: int
    quantized_bytes: int | None = None
    bits_per_weight: float | None = None


def _lower(kind: type[ScaleType] | type[ZeroType]) -> list[str]:
    return [member.name.lower() for member in kind]


@click.command(help=_HELP)
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--format", "format_name", type=click.Choice(_FORMATS), default="nf4", show_default=True)
@click.option("--group-size", type=int, help="Consecutive k that share a scale; -1: K [default: by format].")
@click.option("--nested", is_flag=True, help="Store absmax in 8 bits (double quantization).")
@click.option("--scale-type", type=click.Choice(_lower(ScaleType)), help="How scales are stored.")
@click.option("--zero-type", type=click.Choice(_lower(ZeroType)), help="Zero points, for unsigned formats.")
@click.option("--method", type=click.Choice(["rtn", "hqq"]), default="rtn", show_default=True,
              help="rtn: round to nearest; hqq: also fit float zeros.")  # fmt: skip
@click.option("--include", metavar="GLOB", multiple=True, help="Quantize only matching tensors; repeatable.")
@click.option("--exclude", metavar="GLOB", multiple=True, help="Keep matching tensors; repeatable.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1, ..")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Only show which tensors would be quantized.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize(
    source: Path,
    target: Path,
    format_name: str,
    group_size: int | None,
    nested: bool,
    scale_type: str | None,
    zero_type: str | None,
    method: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    arguments: dict[str, Any] = dict(
        format=format_name, group_size=group_size, nested=nested, scale_type=scale_type, zero_type=zero_type,
        method=method,
    )  # fmt: skip
    _check_settings(arguments, device)
    if not dry_run:
        check_target(source, target, overwrite)
    with Model(source) as model:
        quantized = [name for name in model if model.is_quantized(name)]
        if quantized:
            raise ValueError(f"{source}: is quantized already ({quantized[0]})")
        config = read_config(source)
        if config is not None and "quantization_config" in config:
            method = config["quantization_config"].get("quant_method")
            raise ValueError(f"{source}: is quantized already, by {method}; `pyquant convert` reads such checkpoints")
        selection = Selection(include, exclude)
        weights = {name: model.stored(name) for name in model}
        layers = {
            name: _Layer(name, list(w.shape), w.nbytes) for name, w in weights.items() if selection.picks(name, w)
        }
        if not layers:
            raise ValueError(f"{source}: no tensor to quantize among {len(weights)}")
        quantized_bytes = None
        if not dry_run:
            quantized_bytes = _write(model, target, layers, config, partial(_quantize_layer, arguments, device))
        report = {
            "input": str(source),
            "output": str(target),
            "format": format_name,
            "dry_run": dry_run,
            "layers": [asdict(layer) for layer in layers.values()],
            "copied": len(weights) - len(layers),
            "bytes": model.file_bytes,
            "quantized_bytes": quantized_bytes,
        }
    if as_json:
        output.print_json(report)
    else:
        _print_summary(report, list(layers.values()))


def _check_settings(arguments: dict[str, Any], device: str) -> None:
    """A usage error, before anything is read, for settings that no weight could have."""
    try:
        check_settings(**arguments)
        torch.empty(0, device=device)
    except (ValueError, RuntimeError, AssertionError) as error:
        # RuntimeError and AssertionError: torch's answers to a device that is not there or not built in.
        raise click.UsageError(str(error).splitlines()[0].removeprefix("quantize: ")) from error


def _quantize_layer(arguments: dict[str, Any], device: str, name: str, weight: torch.Tensor) -> QuantizedWeight:
    try:
        quantized: QuantizedWeight = quantize_weight(weight.to(device), **arguments).to("cpu")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return quantized


def _write(
    model: Model,
    target: Path,
    layers: dict[str, _Layer],
    config: dict[str, Any] | None,
    quantize_layer: _QuantizeLayer,
) -> int:
    """Quantize shard by shard; fills in the layers' results. Returns the bytes of the files written."""
    if not model.path.is_dir():
        _write_shard(model.shards[0], target, layers, quantize_layer)
        return target.stat().st_size
    target = target.resolve()
    check_other_weights(target, model.files)
    staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        copy_other_files(model.path, staging)
        weight_map: dict[str, str] = {}
        modules: dict[str, dict[str, Any]] = {}
        tensor_bytes = 0
        for shard in model.shards:
            written = staging / shard.path.name
            _write_shard(shard, written, layers, quantize_layer)
            own, names, nbytes = written_modules(written)
            modules.update(own)
            weight_map.update(dict.fromkeys(names, written.name))
            tensor_bytes += nbytes
        if model.sharded:
            index = {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            with replace_file(staging / INDEX_FILE) as file:
                file.write(json.dumps(index, indent=2).encode())
        if config is not None:
            write_config(staging, config, modules)
        replace_folder(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sum((target / shard.path.name).stat().st_size for shard in model.shards)


def copy_other_files(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """All files of a model folder but its weights and those named in ``without``; ``target`` may exist."""
    left_out = shutil.ignore_patterns(*_WEIGHT_FILES, INDEX_FILE, *without)
    shutil.copytree(source, target, ignore=left_out, dirs_exist_ok=True)


def _write_shard(shard: Reader, target: Path, layers: dict[str, _Layer], quantize_layer: _QuantizeLayer) -> None:
    tensors: dict[str, StoredTensor | QuantizedWeight] = {name: shard.stored(name) for name in shard}
    for name in output.progress([name for name in shard if name in layers], f"Quantizing {shard.path.name}"):
        source = shard[name]
        assert isinstance(source, torch.Tensor)
        weight = quantize_layer(name, source)
        layers[name].quantized_bytes = weight.nbytes
        layers[name].bits_per_weight = weight.bits_per_weight
        tensors[name] = weight
    save(target, tensors, {key: value for key, value in shard.metadata.items() if key != "pyquant"})


def _print_summary(report: dict[str, Any], layers: list[_Layer]) -> None:
    def after(nbytes: int | None) -> str:
        return "-" if nbytes is None else output.size(nbytes)

    rows: list[tuple[object, ...]] = []
    for layer in layers:
        bits = "-" if layer.bits_per_weight is None else f"{layer.bits_per_weight:.3f}"
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        rows.append((layer.name, shape, output.size(layer.bytes), after(layer.quantized_bytes), bits))
    output.print_table(
        f"{report['output']}: {len(layers)} layers in {report['format']}, {report['copied']} tensors copied",
        ("layer", "N x K", "before", "after", "bits per weight"),
        rows,
    )
    before = sum(layer.bytes for layer in layers)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    quantized = sum(layer.quantized_bytes or 0 for layer in layers)
    if report["dry_run"]:
        click.echo(f"linear layers  {output.size(before)} (dry run: nothing was written)")
        return
    click.echo(
        f"linear layers  {output.size(before)} -> {output.size(quantized)}  "
        f"({before / quantized:.2f}x, {8 * quantized / weights:.3f} bits per weight)"
    )
    whole, written = report["bytes"], report["quantized_bytes"]
    click.echo(f"whole file     {output.size(whole)} -> {output.size(written)}  ({whole / written:.2f}x)")
