"""``pyquant convert``: a quantized checkpoint of another project in, a pyquant checkpoint out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from .. import __version__
from ..checkpoint import CheckpointError, Reader, StoredTensor, replace_file, save
from ..load import LoadedLayer, LoadError, Plan, Settings, recognise
from ..weight import QuantizedWeight
from . import output
from .model_files import CONFIG_FILE, INDEX_FILE, Model, read_config, write_config, written_modules
from .output_folder import check_other_weights, check_target, replace_folder
from .quantize import copy_other_files

STATE_FILE = ".convert.json"
# What AutoGPTQ, AutoAWQ and ModelOpt write of their quantization beside config.json; servers look there, too.
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Layers that are read at a time: one's reading hides behind another's computing. More would cost memory.
_THREADS = 2


@click.command()
@click.argument("source", metavar="IN", type=click.Path(exists=True, path_type=Path))
@click.argument("target", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--restart", is_flag=True, help="Convert all shards again, also those that an interrupted run finished.")
@click.option("--dry-run", is_flag=True, help="Only show which layers would be converted.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def convert(source: Path, target: Path, overwrite: bool, restart: bool, dry_run: bool, as_json: bool) -> None:
    """Convert a quantized checkpoint of another project. No weight is quantized again: codes, scales and zero points
    are kept.

    Read are bitsandbytes (nf4, fp4), GPTQ, AWQ, HQQ, compressed-tensors (pack-quantized, nvfp4, mxfp4), ModelOpt NVFP4,
    gpt-oss MXFP4 and torchao Int4; docs/loading.md says what is exact and what is refused. The format is recognised by
    quantization_config in config.json and by the names of tensors.

    IN is a model folder with model.safetensors or shards and their index, or one .safetensors file. OUT is a folder or
    a file accordingly; a folder also gets the other files of the model, and a config.json with pyquant's
    quantization_config. Layers are read one at a time; a shard's quantized weights are held in memory until it is
    written, other tensors are copied in pieces.

    OUT is complete or not written at all. Finished shards of an interrupted run are kept beside OUT (in .OUT.partial),
    and the next run with the same IN goes on from there. Act-order (GPTQ desc_act) becomes a tensor
    <layer>.permutation. With --overwrite the folder is replaced as a whole; files in it that are none of the output's
    stay, weights excepted, which are an error.

    --json prints: input, output, producer, dry_run, layers (name, shape, format, bits, group_size, scale_type,
    zero_type), copied (number of tensors), bytes and converted_bytes (of the safetensors files), resumed
    (number of shards). A dry run has names only, and null where it would need to convert.

    \b
    Examples:
      pyquant convert ./llama-bnb-4bit ./llama-pyquant
      pyquant convert ./llama-gptq ./llama-pyquant --dry-run
      pyquant convert model-nf4-bnb.safetensors model.safetensors --json
    """
    if not dry_run:
        check_target(source, target, overwrite)
    with Model(source) as model:
        config = read_config(source)
        quantization = None if config is None else config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise CheckpointError(f"{source}: {CONFIG_FILE}: quantization_config: expected an object")
        done = [name for name in model if model.is_quantized(name)]
        if done:
            raise ValueError(f"{source}: is a pyquant checkpoint already ({done[0]})")
        metadata = {key: value for shard in model.shards for key, value in shard.metadata.items()}
        plan = recognise(model, quantization)
        job = _Job(model, plan, Settings(quantization or {}, metadata), {})
        resumed, converted_bytes = 0, None
        if not dry_run:
            resumed, converted_bytes = _write(job, config, source, target, restart)
        report = {
            "input": str(source),
            "output": str(target),
            "producer": plan.producer.name,
            "dry_run": dry_run,
            "layers": [{"name": name, **job.modules.get(name, {})} for name in (job.modules or plan.layers)],
            "copied": len(plan.copied),
            "bytes": model.file_bytes,
            "converted_bytes": converted_bytes,
            "resumed": resumed,
        }
    if as_json:
        output.print_json(report)
    else:
        _print_summary(report)


@dataclass
class _Job:
    """What is converted; ``modules`` (by name, for config.json) is filled as layers are done."""

    model: Model
    plan: Plan
    settings: Settings
    modules: dict[str, dict[str, Any]]


class _LayerTensors(Mapping[str, torch.Tensor]):
    """The tensors of one layer and its bias, read when they are asked for, from whatever shard they are in."""

    def __init__(self, model: Model, names: list[str]) -> None:
        self._model = model
        self._names = names

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._model.stored(name).read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _write(job: _Job, config: dict[str, Any] | None, source: Path, target: Path, restart: bool) -> tuple[int, int]:
    """Convert shard by shard. Returns the number of shards found done, and the bytes of the files written."""
    if not source.is_dir():
        _write_shard(job, job.model.shards[0], target)
        job.modules.update(written_modules(target)[0])
        return 0, target.stat().st_size
    target = target.resolve()
    check_other_weights(target, job.model.files)
    staging = target.with_name(f".{target.name}.partial")
    try:
        _open_staging(staging, _fingerprint(job.model, job.settings), restart)
        resumed = 0
        weight_map: dict[str, str] = {}
        tensor_bytes = 0
        for shard in job.model.shards:
            written = staging / shard.path.name
            if written.exists():
                resumed += 1
            else:
                _write_shard(job, shard, written)
            modules, names, nbytes = written_modules(written)
            job.modules.update(modules)
            weight_map.update(dict.fromkeys(names, written.name))
            tensor_bytes += nbytes
        _finish(job, staging, weight_map, tensor_bytes, config)
        _move(staging, target)
    except ValueError:  # bad data: what was written is of no use
        shutil.rmtree(staging, ignore_errors=True)
        raise
    shutil.rmtree(staging, ignore_errors=True)
    return resumed, sum((target / shard.path.name).stat().st_size for shard in job.model.shards)


def _move(staging: Path, target: Path) -> None:
    state = staging / STATE_FILE
    kept = state.read_bytes()
    state.unlink()
    try:
        replace_folder(staging, target)
    except OSError:  # all shards are done: another run has only this to do
        state.write_bytes(kept)
        raise


def _fingerprint(model: Model, settings: Settings) -> dict[str, Any]:
    """What must be equal for finished shards to be of use."""
    files = {s.path.name: [(stat := s.path.stat()).st_size, stat.st_mtime_ns] for s in model.shards}
    return {"version": __version__, "files": files, "config": dict(settings.config)}


def _open_staging(staging: Path, fingerprint: dict[str, Any], restart: bool) -> None:
    """The folder of an interrupted run of the same input, else an empty one."""
    state = staging / STATE_FILE
    try:
        same = json.loads(state.read_text(encoding="utf-8")) == json.loads(json.dumps(fingerprint))
    except (OSError, ValueError):
        same = False
    if same and not restart:
        for unfinished in staging.glob(".*.tmp"):  # what a killed process was writing
            unfinished.unlink()
        return
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    with replace_file(state) as file:
        file.write(json.dumps(fingerprint).encode())


def _write_shard(job: _Job, shard: Reader, target: Path) -> None:
    """The layers whose first tensor is in this shard, and the ordinary tensors of it."""
    stored = set(shard)
    tensors: dict[str, torch.Tensor | StoredTensor | QuantizedWeight] = {
        n: shard.stored(n) for n in job.plan.copied if n in stored
    }
    layers = [prefix for prefix, names in job.plan.layers.items() if names[0] in stored]
    with ThreadPoolExecutor(_THREADS) as pool:
        done = pool.map(partial(_load, job), layers)
        for parts in output.progress(done, f"Converting {shard.path.name}", total=len(layers)):
            tensors.update(parts)
    text = {key: value for key, value in shard.metadata.items() if key == "format"}
    save(target, tensors, text)


def _load(job: _Job, prefix: str) -> dict[str, torch.Tensor | QuantizedWeight]:
    """What a layer becomes in the output, by name."""
    names = job.plan.layers[prefix]
    bias = [f"{prefix}.bias"] if f"{prefix}.bias" in job.model else []
    try:
        loaded = job.plan.producer.load(_LayerTensors(job.model, names + bias), prefix, job.settings)
    except LoadError as error:
        files = ", ".join(job.model.files_of(names))
        raise LoadError(f"{error}; layer {prefix} of {files}, nothing was converted") from error
    return {key: t for name, layer in loaded.items() for key, t in _stored(name, layer, copied=bool(bias)).items()}


def _stored(name: str, layer: LoadedLayer, copied: bool) -> dict[str, torch.Tensor | QuantizedWeight]:
    """What a layer is in the output; ``copied`` is whether its bias is an ordinary tensor of the input."""
    parts: dict[str, torch.Tensor | QuantizedWeight] = {f"{name}.weight": layer.weight}
    if layer.bias is not None and not copied:
        parts[f"{name}.bias"] = layer.bias
    if layer.permutation is not None:
        parts[f"{name}.permutation"] = layer.permutation
    return parts


def _finish(
    job: _Job, staging: Path, weight_map: dict[str, str], tensor_bytes: int, config: dict[str, Any] | None
) -> None:
    """All that a model folder holds beside its shards."""
    copy_other_files(job.model.path, staging, _QUANTIZATION_FILES)
    if job.model.sharded:
        index = {"metadata": {"total_size": tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        with replace_file(staging / INDEX_FILE) as file:
            file.write(json.dumps(index, indent=2).encode())
    write_config(staging, config or {}, job.modules, converted_from=job.plan.producer.name)


def _print_summary(report: dict[str, Any]) -> None:
    rows = [
        (m["name"], "x".join(map(str, m.get("shape", "-"))), m.get("format", "-"), m.get("group_size", "-"))
        for m in report["layers"]
    ]
    title = f"{report['output']}: {len(rows)} layers of {report['producer']}, {report['copied']} tensors copied"
    output.print_table(title, ("layer", "N x K", "format", "group size"), rows)
    if report["dry_run"]:
        click.echo("dry run: nothing was written")
        return
    if report["resumed"]:
        click.echo(f"{report['resumed']} shards were done by an earlier run")
    if Path(report["output"]).is_dir():
        click.echo("transformers loads it after `import pyquant.hf`")
    click.echo(f"whole model  {output.size(report['bytes'])} -> {output.size(report['converted_bytes'])}")
