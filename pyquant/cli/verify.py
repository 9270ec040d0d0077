"""``pyquant verify``: a quantized checkpoint against the one it was made from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from ..weight import QuantizedWeight
from . import output
from .model_files import Model


@dataclass(frozen=True)
class _Energy:
    """Sums over weights, in double precision."""

    signal: float  # of w^2
    noise: float  # of (w - dequantized)^2

    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None when the weights are equal."""
        if self.noise == 0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def relative_error(self) -> float:
        """Norm of the error over the norm of the weight."""
        if self.noise == 0:
            return 0.0
        return math.sqrt(self.noise / self.signal) if self.signal else math.inf


@dataclass(frozen=True)
class _Layer:
    """One weight compared."""

    name: str
    format: str
    shape: list[int]
    sqnr_db: float | None
    max_abs_error: float
    relative_error: float
    bits_per_weight: float


@click.command()
@click.argument("quantized", type=click.Path(exists=True, path_type=Path))
@click.argument("original", type=click.Path(exists=True, path_type=Path))
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail when a layer's SQNR is below this.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(quantized: Path, original: Path, min_sqnr: float | None, as_json: bool) -> None:
    """Compare every layer of a quantized checkpoint with the original, both files or both folders.

    Reported per layer: SQNR (dB; 10 log10 of sum w^2 over sum of squared errors), largest absolute error,
    relative error (norms), bits per weight. Checksums are checked on the way, and tensors that were copied
    must be equal.

    Exit code 1 when a tensor is missing on either side, shapes differ, a copied tensor differs, a checksum is
    wrong, or a layer's SQNR is below --min-sqnr.

    --json prints: quantized, original, ok, problems (lines), layers (name, format, shape, sqnr_db,
    max_abs_error, relative_error, bits_per_weight), total (the same over all layers, and copied: tensors
    equal to the original's). Numbers that are not finite are null: sqnr_db of a layer without error.

    \b
    Examples:
      pyquant verify model-nf4.safetensors model.safetensors
      pyquant verify ./llama-int4 ./llama --min-sqnr 18 --json
    """
    problems: list[str] = []
    layers: list[_Layer] = []
    energies: list[_Energy] = []
    weights = stored_bytes = copied = 0
    with Model(quantized) as result, Model(original) as source:
        problems += [f"{name}: missing in the quantized checkpoint" for name in source if name not in result]
        for name in output.progress(list(result), "Verifying"):
            if name not in source:
                problems.append(f"{name}: missing in the original")
                continue
            if source.is_quantized(name):
                raise ValueError(f"{original}: {name} is quantized; expected the original checkpoint")
            value, reference = result[name], source[name]
            assert isinstance(reference, torch.Tensor)
            if value.shape != reference.shape:
                problems.append(f"{name}: shape {list(value.shape)}, in the original {list(reference.shape)}")
            elif not isinstance(value, QuantizedWeight):
                if value.dtype == reference.dtype and torch.equal(_bytes(value), _bytes(reference)):
                    copied += 1
                else:
                    problems.append(f"{name}: differs from the original, and is not quantized")
            else:
                layer, energy = _compare(name, value, reference)
                layers.append(layer)
                energies.append(energy)
                weights += value.n * value.k
                stored_bytes += value.nbytes
                if not math.isfinite(energy.noise):
                    problems.append(f"{name}: NaN or Inf in the original or the dequantized weight")
                elif min_sqnr is not None and layer.sqnr_db is not None and layer.sqnr_db < min_sqnr:
                    problems.append(f"{name}: SQNR {layer.sqnr_db:.2f} dB, expected at least {min_sqnr:g} dB")
    if not layers:
        problems.append("no layer could be compared")
    total = _Energy(sum(e.signal for e in energies), sum(e.noise for e in energies))
    report: dict[str, Any] = {
        "quantized": str(quantized),
        "original": str(original),
        "ok": not problems,
        "problems": problems,
        "layers": [asdict(layer) for layer in layers],
        "total": {
            "sqnr_db": total.sqnr_db(),
            "max_abs_error": max((layer.max_abs_error for layer in layers), default=0.0),
            "relative_error": total.relative_error(),
            "bits_per_weight": 8 * stored_bytes / max(1, weights),
            "copied": copied,
        },
    }
    if as_json:
        output.print_json(report)
    else:
        _print_report(layers, total, report)
    for problem in problems:
        click.echo(f"Error: {problem}", err=True)
    if problems:
        raise click.exceptions.Exit(1)


def _compare(name: str, weight: QuantizedWeight, reference: torch.Tensor) -> tuple[_Layer, _Energy]:
    error = weight.dequantize() - reference
    energy = _Energy(_square_sum(reference), _square_sum(error))
    layer = _Layer(
        name,
        weight.format.name,
        list(weight.shape),
        energy.sqnr_db(),
        error.abs().max().item(),
        energy.relative_error(),
        weight.bits_per_weight,
    )
    return layer, energy


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)  # equal NaNs are equal bytes


def _square_sum(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _print_report(layers: list[_Layer], total: _Energy, report: dict[str, Any]) -> None:
    def db(value: float | None) -> str:
        return "exact" if value is None else f"{value:.2f}"

    rows: list[tuple[object, ...]] = [
        (
            layer.name,
            layer.format,
            f"{layer.shape[0]} x {layer.shape[1]}",
            db(layer.sqnr_db),
            f"{layer.max_abs_error:.3g}",
            f"{layer.relative_error:.4f}",
            f"{layer.bits_per_weight:.3f}",
        )
        for layer in layers
    ]
    sums = report["total"]
    rows.append(
        (
            "all layers",
            "",
            "",
            db(total.sqnr_db()),
            f"{sums['max_abs_error']:.3g}",
            f"{sums['relative_error']:.4f}",
            f"{sums['bits_per_weight']:.3f}",
        )
    )
    output.print_table(
        f"{report['quantized']} against {report['original']}",
        ("layer", "format", "N x K", "SQNR dB", "max abs error", "rel. error", "bits per weight"),
        rows,
    )
    state = "ok" if report["ok"] else "FAILED"
    click.echo(f"{state}: {len(layers)} layers compared, {sums['copied']} copied tensors equal")
