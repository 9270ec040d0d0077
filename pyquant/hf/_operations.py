"""The two operations that transformers' loader runs on tensors of quantized weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import ConversionOps

from ..checkpoint import settings
from ..formats import Encoding, Format, ScaleType, ZeroType, format_by_id
from ..load import LoadedLayer
from ..quantize import quantize
from ..weight import QuantizedWeight
from ._install import install
from ._targets import Target

if TYPE_CHECKING:
    from ._quantizer import PyquantHfQuantizer

# What a quantized weight called `<p>.weight` is stored as, behind `<p>.`.
STORED_NAMES = (*(f"weight.{part}" for part in (*QuantizedWeight.TENSORS, "quant_spec")), "permutation")


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: PyquantHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: object) -> _Operation:
        return self  # the loader copies operations for each parameter; there is one quantizer


class PyquantQuantize(_Operation):
    """A weight in full precision becomes quantized layers of the model; it runs when all other operations have run."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, **arguments: Any) -> dict[str, Any]:
        """Returns the tensors that are not to be quantized."""
        rest = {}
        for name, value in input_dict.items():
            target = self.hf_quantizer.targets.get(name)
            if target is None:
                rest[name] = value
                continue
            with self.hf_quantizer.collect_errors(name):
                layers = self._layers(target, value[0] if isinstance(value, list) else value)
                install(arguments["model"], target, layers)
                arguments["missing_keys"].discard(name)
        return rest

    def _layers(self, target: Target, w: torch.Tensor) -> list[list[LoadedLayer]]:
        if w.shape != target.shape:
            raise ValueError(f"expected shape {list(target.shape)}, got {list(w.shape)}")
        matrices = (w,) if target.experts is None else w.unbind()
        quantized = (quantize(m.T if target.transposed else m, **self.hf_quantizer.arguments) for m in matrices)
        return [[LoadedLayer(weight)] for weight in quantized]


class PyquantDeserialize(_Operation):
    """The tensors of a quantized layer, or of all experts of a fused one, become quantized layers of the model."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], *_: Any, **arguments: Any
    ) -> dict[str, Any]:
        """Returns nothing that would be left to load."""
        name = arguments["full_layer_name"]
        stems: dict[str, dict[str, list[torch.Tensor]]] = {}
        for pattern in source_patterns:
            if pattern in input_dict:
                part = next(part for part in STORED_NAMES if pattern.endswith(part))
                stems.setdefault(pattern.removesuffix(part), {})[part.removeprefix("weight.")] = input_dict[pattern]
        with self.hf_quantizer.collect_errors(name):
            target = self.hf_quantizer.targets.get(name)
            if target is None:
                raise ValueError("is quantized, but not among `modules` of config.json's quantization_config")
            install(arguments["model"], target, self._layers(target, stems.values()))
            arguments["missing_keys"].discard(name)
        return {}

    def _layers(self, target: Target, stems: Iterable[Mapping[str, list[torch.Tensor]]]) -> list[list[LoadedLayer]]:
        """Of each expert, the layers whose outputs stand side by side."""
        count = target.experts or 1
        experts: list[list[LoadedLayer]] = [[] for _ in range(count)]
        for parts in stems:
            layers = _layers(parts)
            if len(layers) % count:
                raise ValueError(f"expected the same number of weights for each of {count} experts, got {len(layers)}")
            each = len(layers) // count
            for e, expert in enumerate(experts):
                expert += layers[e * each : (e + 1) * each]
        for expert in experts:
            shapes = [list(layer.weight.shape) for layer in expert]
            if sum(n for n, _ in shapes) != target.n or any(k != target.k for _, k in shapes):
                raise ValueError(f"expected a weight of {[target.n, target.k]}, got {shapes}")
            for layer in expert:
                about, listed = settings(layer.weight), self.hf_quantizer.listed[target.name]
                if about not in listed:
                    raise ValueError(f"config.json says {listed[0]}, the tensors {about}: of another checkpoint?")
        return experts


def parts_of(fmt: Format, scale_type: ScaleType, zero_type: ZeroType) -> list[str]:
    """The parts that a stored weight must have."""
    parts = ["quant_spec", "codes", "scales"]
    if zero_type is not ZeroType.NONE:
        parts.append("zeros")
    if scale_type is ScaleType.NESTED:
        parts += ["nested_map", "nested_absmax", "nested_offset"]
    if fmt.tensor_scale:
        parts.append("tensor_scale")
    if fmt.needs_codebook:
        parts.append("codebook")
    return parts


def _layers(parts: Mapping[str, list[torch.Tensor]]) -> list[LoadedLayer]:
    """The layers whose tensors were collected in one order, each part in a list of its own.

    Experts may differ in format, and then in the parts that they have."""
    if "quant_spec" not in parts:
        raise ValueError("quant_spec: expected a tensor, got none")
    for stored in parts["quant_spec"]:
        if stored.shape != (7,):
            raise ValueError(f"quant_spec: expected int64 [7], got {stored.dtype} {list(stored.shape)}")
    specs = [spec.tolist() for spec in parts["quant_spec"]]
    formats = [format_by_id(spec[1]) for spec in specs]
    needed = sum(fmt.needs_codebook for fmt in formats)
    own_codebooks = len(parts.get("codebook", ())) > needed
    left = {name: iter(tensors) for name, tensors in parts.items()}
    layers = []
    for i, (spec, fmt) in enumerate(zip(specs, formats, strict=True)):
        names = parts_of(fmt, ScaleType(spec[2]), ZeroType(spec[3]))
        if own_codebooks and fmt.encoding is Encoding.CODEBOOK and not fmt.needs_codebook:
            names.append("codebook")
        state = {name: tensor for name in names if (tensor := next(left.get(name, iter(())), None)) is not None}
        prefix = "" if len(specs) == 1 else f"{i}."
        weight = QuantizedWeight.from_state_dict({prefix + name: t for name, t in state.items()}, prefix)
        _check_finite(weight, prefix)
        layers.append(LoadedLayer(weight, None, next(left["permutation"], None) if "permutation" in parts else None))
    for name, tensors in left.items():
        if next(tensors, None) is not None or (name == "permutation" and layers[-1].permutation is None):
            raise ValueError(f"{name}: expected one for each weight that has it, got {len(parts[name])}")
    return layers


def _check_finite(weight: QuantizedWeight, prefix: str) -> None:
    values = {"scales": weight.decode_scales(), "zeros": weight.zeros, "codebook": weight.codebook}
    for name, tensor in values.items():
        if tensor is not None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{prefix}{name}: expected finite values, got NaN or Inf")
