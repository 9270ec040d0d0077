"""``pyquant info``: what this installation can do, or what a checkpoint holds."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click
import torch

from .. import __version__
from ..formats import FORMATS, Format
from ..weight import QuantizedWeight
from . import output
from .model_files import Model


@click.command()
@click.argument("file", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def info(file: Path | None, as_json: bool) -> None:
    """Show this installation, or what is in FILE (a checkpoint or a model folder).

    All of FILE is read, so checksums are checked and damage is found.

    --json prints, without FILE: pyquant, torch, python, cpu (threads, cores), cuda (device, or why there is
    none), library (how it was built), instances (name, device, available), formats (name, bits, encoding,
    scale_types, zero_types, group_sizes, group_size, source; without group_sizes: any power of two from 16
    up, or K). With FILE: file, checked (whether there are checksums), bytes, layers (name, format, shape,
    group_size, scale_type, zero_type, bytes, bits_per_weight), tensors (name, dtype, shape, bytes).

    \b
    Examples:
      pyquant info
      pyquant info model-nf4.safetensors
      pyquant info ./llama-int4 --json
    """
    report = _installation() if file is None else _checkpoint(file)
    if as_json:
        output.print_json(report)
    elif file is None:
        _print_installation(report)
    else:
        _print_checkpoint(report)


def _installation() -> dict[str, Any]:
    from .. import _library  # here, so that the commands that need no kernel run without the library

    return {
        "pyquant": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": {"threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "cuda": _cuda_device(),
        "library": _library.build_info(),
        "instances": _library.instances(),
        "formats": [_format_row(row) for row in FORMATS.values()],
    }


def _cuda_device() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    if not torch.cuda.is_available():
        return f"none: torch is built for CUDA {torch.version.cuda}, but finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"


def _format_row(row: Format) -> dict[str, Any]:
    return {
        "name": row.name,
        "bits": row.bits,
        "encoding": row.encoding.name.lower(),
        "scale_types": [t.name.lower() for t in row.scale_types],
        "zero_types": [t.name.lower() for t in row.zero_types],
        "group_sizes": list(row.group_sizes),
        "group_size": row.group_size or "K",
        "source": row.source,
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    layers: list[dict[str, Any]] = []
    tensors: list[dict[str, Any]] = []
    with Model(path) as model:
        for name in output.progress(list(model), "Reading"):
            value = model[name]
            if isinstance(value, QuantizedWeight):
                layers.append(
                    {
                        "name": name,
                        "format": value.format.name,
                        "shape": list(value.shape),
                        "group_size": value.group_size,
                        "scale_type": value.scale_type.name.lower(),
                        "zero_type": value.zero_type.name.lower(),
                        "bytes": value.nbytes,
                        "bits_per_weight": value.bits_per_weight,
                    }
                )
            else:
                dtype = str(value.dtype).removeprefix("torch.")
                tensors.append({"name": name, "dtype": dtype, "shape": list(value.shape), "bytes": value.nbytes})
        return {
            "file": str(path),
            "checked": all(shard.checked for shard in model.shards),
            "bytes": model.file_bytes,
            "layers": layers,
            "tensors": tensors,
        }


def _print_installation(report: dict[str, Any]) -> None:
    click.echo(f"pyquant {report['pyquant']}, torch {report['torch']}, Python {report['python']}")
    click.echo(f"CPU     {report['cpu']['cores']} cores, {report['cpu']['threads']} threads")
    click.echo(f"GPU     {report['cuda']}")
    click.echo("library " + ", ".join(f"{key} {value}" for key, value in report["library"].items()) + "\n")
    output.print_table(
        "kernel instances",
        ("instance", "device", "on this machine"),
        [(i["name"], i["device"], "available" if i["available"] else "no") for i in report["instances"]],
    )
    output.print_table(
        "formats (defaults first)",
        ("format", "bits", "encoding", "scales", "zeros", "group sizes", "source"),
        [
            (
                row["name"],
                row["bits"],
                row["encoding"],
                " ".join(row["scale_types"]),
                " ".join(row["zero_types"]),
                _group_sizes(row),
                row["source"],
            )
            for row in report["formats"]
        ],
    )


def _group_sizes(row: dict[str, Any]) -> str:
    sizes = row["group_sizes"]
    if not sizes:
        return f"{row['group_size']}, 2^i >= 16, K" if row["group_size"] != "K" else "K, 2^i >= 16"
    return str(sizes[0]) if len(sizes) == 1 else f"{row['group_size']}, {sizes[0]} .. {sizes[-1]}"


def _print_checkpoint(report: dict[str, Any]) -> None:
    layers, tensors = report["layers"], report["tensors"]
    if layers:
        output.print_table(
            f"{len(layers)} quantized layers",
            ("layer", "format", "N x K", "group", "scales", "zeros", "size", "bits per weight"),
            [
                (
                    layer["name"],
                    layer["format"],
                    f"{layer['shape'][0]} x {layer['shape'][1]}",
                    layer["group_size"],
                    layer["scale_type"],
                    layer["zero_type"],
                    output.size(layer["bytes"]),
                    f"{layer['bits_per_weight']:.3f}",
                )
                for layer in layers
            ],
        )
    if tensors:
        output.print_table(
            f"{len(tensors)} other tensors",
            ("tensor", "dtype", "shape", "size"),
            [(t["name"], t["dtype"], t["shape"], output.size(t["bytes"])) for t in tensors],
        )
    checksums = "checksums match" if report["checked"] else "no checksums in the file"
    click.echo(f"{report['file']}: {output.size(report['bytes'])}, {checksums}")
