"""A quantized checkpoint against the model that it is loaded into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from copy import copy, deepcopy
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from ..formats import FORMATS, ScaleType, ZeroType
from ._operations import STORED_NAMES, PyquantDeserialize, parts_of
from ._targets import Target, find_targets, tied_names

if TYPE_CHECKING:
    from ._quantizer import PyquantHfQuantizer

_SPEC = ".weight.quant_spec"


class _Collector(WeightConverter):
    """Collects the tensors of quantized weights; cheap to copy, which the loader does for every tensor."""

    __slots__ = ()

    def __deepcopy__(self, memo: object) -> _Collector:
        other = copy(self)
        other.collected_tensors, other.layer_targets = defaultdict(list), defaultdict(set)
        return other


def load_conversions(
    quantizer: PyquantHfQuantizer, conversions: Iterable[WeightTransform], model: nn.Module
) -> list[WeightTransform]:
    """The model's conversions, and before them those that collect the tensors of quantized weights."""
    conversions = list(conversions)
    fused = {_end(name): target for name, target in find_targets(model).items() if target.experts is not None}
    own: list[WeightTransform] = []
    for converter in conversions:
        # Experts that the checkpoint keeps apart: gate and up become layers side by side.
        if isinstance(converter, WeightConverter) and _merges_experts(converter, fused):
            stems = [source.removesuffix("weight") for source in converter._original_source_patterns]
            sources = [stem + stored for stem in stems for stored in STORED_NAMES]
            collector = _Collector(sources, converter._original_target_patterns, [PyquantDeserialize(quantizer)])
            collector.scope_prefix, collector.base_model_prefix = converter.scope_prefix, converter.base_model_prefix
            own.append(collector)
    for name, target in fused.items():
        sources = [f"{name}.*.{stored}" for stored in STORED_NAMES]
        own.append(_Collector(sources, name, [PyquantDeserialize(quantizer)]))
        if model.get_submodule(target.module).has_bias:
            own.append(WeightConverter(f"{name}.*.bias", f"{name}_bias", [MergeModulelist(dim=0)]))
    linear = _Collector(list(STORED_NAMES), "weight", [PyquantDeserialize(quantizer)])
    return [*own, *conversions, linear]


def checkpoint_targets(
    modules: Mapping[str, Mapping[str, Any]],
    files: Iterable[str],
    conversions: Iterable[WeightTransform],
    model: nn.Module,
) -> dict[Target, list[str]]:
    """The parameters that a checkpoint's quantized weights belong to, and for each its modules in the checkpoint.

    Args:
        modules: of ``quantization_config``.
        files: the checkpoint's safetensors files; empty if they are not known.
        conversions: of :func:`load_conversions`.
        model: on the meta device.

    Raises:
        ValueError: a weight that does not fit the model, or of which tensors are missing.
    """
    resolve = _resolver(conversions, model)
    targets = find_targets(model)
    by_target: dict[str, list[str]] = {}
    for module in sorted(modules, key=dot_natural_key):
        name = resolve(module)
        if name in targets:
            by_target.setdefault(name, []).append(module)
        elif name is not None:
            raise ValueError(
                f"pyquant: {module}: is quantized, but {name} of the model is no weight of a linear layer; "
                "quantize the model without it"
            )
    if not by_target:
        raise ValueError(
            f"pyquant: none of the {len(modules)} quantized modules of config.json, such as "
            f"{next(iter(modules), 'none')!r}, is in {type(model).__name__}: of another model?"
        )
    for name in by_target.keys() & tied_names(model):
        raise ValueError(
            f"pyquant: {name}: is quantized, but tied to another weight; "
            'set "tie_word_embeddings": false in config.json'
        )
    for name, own in by_target.items():
        _check_shapes(targets[name], {module: modules[module]["shape"] for module in own})
    stored = _stored_names(files)
    if stored:
        _check_stored(by_target, modules, stored, resolve)
    return {targets[name]: own for name, own in by_target.items()}


def _merges_experts(converter: WeightConverter, fused: Mapping[str, Target]) -> bool:
    """Whether the converter stacks the experts of linear layers in a fused parameter."""
    target = converter._original_target_patterns[0]
    return (
        any(target.endswith(name) or f".{name}".endswith(target) for name in fused)
        and all(source.endswith(".weight") and "*." in source for source in converter._original_source_patterns)
        and {type(op).__name__ for op in converter.operations} <= {"MergeModulelist", "Concatenate"}
    )


def _resolver(conversions: Iterable[WeightTransform], model: nn.Module) -> Callable[[str], str | None]:
    """A function from the name of a quantized module, as files or the model have it, to the model's parameter."""
    conversions = deepcopy(list(conversions))  # they note whether they were used
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    parameters = model.state_dict()
    prefix: str = model.base_model_prefix  # type: ignore[assignment]

    def resolve(module: str) -> str | None:
        stored = apply_renamings(module + _SPEC, renamings)
        first = next(c for c in converters if c.rename_source_key(stored)[1] is not None)
        if not isinstance(first.operations[0], PyquantDeserialize):
            raise ValueError(
                f"pyquant: {module}: is quantized, but {type(model).__name__} stores this weight in another form (by "
                f"{first.operations}), which quantized weights cannot be brought into"
            )
        name, _ = rename_source_key(module + _SPEC, renamings, converters, prefix, parameters)
        own = f"{module}.weight"  # config.json may have the model's names
        return name if name in parameters else own if own in parameters else None

    return resolve


def _check_shapes(target: Target, shapes: Mapping[str, list[int]]) -> None:
    count = target.experts or 1
    rows = sum(n for n, _ in shapes.values())
    wrong_k = [module for module, (_, k) in shapes.items() if k != target.k]
    if wrong_k or rows != count * target.n or len(shapes) % count:
        module = wrong_k[0] if wrong_k else next(iter(shapes))
        of = "" if target.experts is None else f" for each of {count} experts"
        raise ValueError(
            f"pyquant: {module}: expected weights of [N, K] = {[target.n, target.k]}{of} for {target.name}, "
            f"got {len(shapes)} with N = {rows} in all and K = {shapes[module][1]}; "
            "does config.json belong to the checkpoint?"
        )


def _stored_names(files: Iterable[str]) -> set[str]:
    names: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    return names


def _check_stored(
    by_target: Mapping[str, list[str]],
    modules: Mapping[str, Mapping[str, Any]],
    stored: set[str],
    resolve: Callable[[str], str | None],
) -> None:
    """Raise ValueError unless the files hold all tensors of the weights that config.json lists."""
    found: dict[str | None, list[str]] = {}
    for name in sorted((n for n in stored if n.endswith(_SPEC)), key=dot_natural_key):
        found.setdefault(resolve(name.removesuffix(_SPEC)), []).append(name.removesuffix(_SPEC))
    for target, listed in by_target.items():
        have = found.get(target, [])
        if len(have) != len(listed):
            # Files and config.json may name a module differently, but not its end.
            ends = {_end(stem) for stem in have}
            missing = next((module for module in listed if _end(module) not in ends), listed[0])
            raise ValueError(
                f"pyquant: {target}: expected {len(listed)} quantized weights in the checkpoint's files, got "
                f"{len(have)}; missing is {missing + _SPEC}; the checkpoint is incomplete: download or convert it again"
            )
        # Both are in one order.
        for module, stem in zip(listed, have, strict=True):
            about = modules[module]
            scale_type, zero_type = ScaleType[about["scale_type"].upper()], ZeroType[about["zero_type"].upper()]
            for part in parts_of(FORMATS[about["format"]], scale_type, zero_type):
                if f"{stem}.weight.{part}" not in stored:
                    raise ValueError(
                        f"pyquant: {stem}.weight.{part}: expected a tensor in the checkpoint's files, got none; "
                        "the checkpoint is incomplete: download or convert it again"
                    )


def _end(module: str) -> str:
    """The last two parts of a name."""
    return ".".join(module.split(".")[-2:])
