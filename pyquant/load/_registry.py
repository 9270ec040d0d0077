"""Which producer made a checkpoint, which of its tensors belong to which layer, and which loader reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ._awq import awq
from ._bitsandbytes import QUANT_STATE, bitsandbytes
from ._compressed_tensors import compressed_tensors
from ._fp4 import mxfp4_experts, nvfp4
from ._gptq import gptq
from ._hqq import hqq
from ._layer import LoadedLayer, LoadError
from ._torchao import torchao

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What stands beside the tensors: ``quantization_config`` of config.json, and the files' metadata."""

    config: Mapping[str, Any]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class Producer:
    """One row of the registry.

    Attributes:
        name: as ``quant_method`` of config.json has it.
        markers: ends of tensor names; a name with one of them is a layer's.
        parts: the other ends of the names of a layer's tensors, the bias excepted.
        load: from tensors, a layer's prefix and the settings to layers by module name.
        needs_config: the tensors alone do not say what they mean.
    """

    name: str
    markers: tuple[str, ...]
    parts: tuple[str, ...]
    load: Callable[[Tensors, str, Settings], dict[str, LoadedLayer]]
    needs_config: bool = False


@dataclass(frozen=True)
class Plan:
    """What of a checkpoint is to be loaded: the tensors of each layer, its marker first, and the ordinary tensors."""

    producer: Producer
    layers: dict[str, list[str]]
    copied: list[str]


def _group_size(loader: str, config: Mapping[str, Any]) -> int | None:
    size = config.get("group_size")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise LoadError(f"load.{loader}: quantization_config: group_size: expected a number or -1 for K, got {size!r}")
    return size


def _gptq(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, LoadedLayer]:
    config = settings.config
    overridden = [rule for rule in config.get("dynamic") or {} if not str(rule).startswith("-:")]
    if overridden:
        raise LoadError(
            f"load.gptq: quantization_config: dynamic: expected no settings of single layers, got {overridden[0]!r}"
        )
    layer = gptq(
        tensors, prefix, bits=config.get("bits", 4), group_size=_group_size("gptq", config),
        checkpoint_format=config.get("checkpoint_format") or "gptq",
    )  # fmt: skip
    return {prefix: layer}


def _awq(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, LoadedLayer]:
    config = settings.config
    if config.get("bits", 4) != 4:
        raise LoadError(f"load.awq: quantization_config: bits: expected 4, got {config['bits']!r}")
    version = str(config.get("version") or "gemm")
    return {prefix: awq(tensors, prefix, group_size=_group_size("awq", config), version=version)}


def _compressed_tensors(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, LoadedLayer]:
    groups = settings.config.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise LoadError(
            "load.compressed_tensors: quantization_config: config_groups: "
            f"expected an object of objects, got {groups!r}"
        )
    weights = [group.get("weights") or {} for group in groups.values()]
    sizes = {_group_size("compressed_tensors", w) for w in weights}
    group_size = sizes.pop() if len(sizes) == 1 else None
    return {prefix: compressed_tensors(tensors, prefix, group_size=group_size)}


def _torchao(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, LoadedLayer]:
    kind = shape = None
    text = settings.metadata.get(f"{prefix}.weight")
    if text is not None:
        try:
            about = json.loads(text)
            kind, shape = about["_type"], about["_data"].get("shape")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LoadError(
                f"load.torchao: metadata of {prefix}.weight: expected torchao's JSON, got {text!r}"
            ) from error
    return {prefix: torchao(tensors, prefix, shape=shape, kind=kind)}


def _experts(tensors: Tensors, prefix: str, settings: Settings) -> dict[str, LoadedLayer]:
    return {f"{prefix}.{e}": layer for e, layer in enumerate(mxfp4_experts(tensors, prefix))}


_HQQ_PARTS = (
    ".scale", ".zero", ".nbits", ".group_size", ".shape", ".axis", ".packing", ".unpack_view_dtype", ".view_as_float",
    ".quant_scale", ".quant_zero", ".compute_dtype", ".offload_meta", ".encoded_state_dict", ".stores_quant_config",
    ".channel_wise", ".optimize", ".round_zero",
)  # fmt: skip
PRODUCERS = (
    Producer(
        "bitsandbytes",
        tuple(f".{QUANT_STATE}{name}" for name in ("nf4", "fp4")),
        tuple(f".weight{part}" for part in ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")),
        lambda tensors, prefix, settings: {prefix: bitsandbytes(tensors, prefix)},
    ),
    Producer("gptq", (".qweight",), (".qzeros", ".scales", ".g_idx"), _gptq, needs_config=True),
    Producer("awq", (".qweight",), (".qzeros", ".scales"), _awq, needs_config=True),
    Producer(
        "hqq",
        (".W_q",),
        _HQQ_PARTS,
        lambda tensors, prefix, settings: {prefix: hqq(tensors, prefix)},
    ),
    Producer(
        "compressed-tensors",
        (".weight_packed",),
        tuple(f".weight_{name}" for name in ("scale", "shape", "zero_point", "g_idx", "global_scale")),
        _compressed_tensors,
    ),
    Producer(
        "modelopt",
        (".weight_scale_2",),
        (".weight", ".weight_scale", ".pre_quant_scale", ".svdquant_lora_a", ".svdquant_lora_b"),
        lambda tensors, prefix, settings: {prefix: nvfp4(tensors, prefix)},
    ),
    Producer("mxfp4", ("_blocks",), ("_scales", "_bias"), _experts),
    Producer(
        "torchao",
        ("._weight_qdata",),
        tuple(f"._weight_{name}" for name in ("scale", "zero_point", "scale_and_zero", "act_pre_scale")),
        _torchao,
    ),
)  # fmt: skip
# Ends of names that only quantized layers have: left over, they belong to a format that the plan does not cover.
_QUANTIZED = (
    ".qweight", ".qzeros", ".g_idx", ".W_q", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".weight_scale_2",
    ".weight_zero_point", ".SCB", ".absmax", ".quant_map", "_blocks", "._weight_qdata", "._weight_scale", ".scales",
)  # fmt: skip
# Ends of names under which a converted layer is stored.
_OUTPUTS = (".weight", ".permutation")


def recognise(names: Iterable[str], config: Mapping[str, Any] | None) -> Plan:
    """The plan for a checkpoint with tensors ``names``, whose config.json has this ``quantization_config`` (or none).

    Raises:
        LoadError: an unknown ``quant_method``; no quantized layer; layers of several formats; tensors that need a
            ``quantization_config`` to be understood, without one; layers without their main tensor, or with an ordinary
            weight beside it.
    """
    stored = sorted(names)
    producer = _producer(stored, config)
    markers = {name: end for name in stored for end in producer.markers if name.endswith(end)}
    if not markers:
        int8 = next((name for name in stored if name.endswith(".SCB")), None)
        got = "none" if int8 is None else f"those of LLM.int8(), {int8}, which is no 4-bit format: load it in 4 bits"
        raise LoadError(f"load.recognise: {producer.name}: expected tensors called *{producer.markers[0]}, got {got}")
    known = set(stored)
    layers: dict[str, list[str]] = {}
    for name, end in markers.items():
        prefix = name.removesuffix(end)
        layers.setdefault(prefix, []).append(name)
    for prefix, own in layers.items():
        own += [prefix + part for part in producer.parts if prefix + part in known]
    claimed = {name for own in layers.values() for name in own}
    copied = [name for name in stored if name not in claimed]
    for name in copied:
        module = next((name.removesuffix(end) for end in producer.parts if name.endswith(end)), None)
        if name.endswith(_QUANTIZED) and module is not None:
            raise LoadError(
                f"load.recognise: {name}: expected {module}{producer.markers[0]} beside it, got none: the checkpoint "
                "is incomplete and to be downloaded again, or of mixed formats, which are not read"
            )
        if name.endswith(_QUANTIZED):
            raise LoadError(
                f"load.recognise: {name}: expected a tensor of {producer.name} or of no quantized layer; "
                "checkpoints of mixed formats are not read; dequantize the layers of all but one"
            )
        module = name.rpartition(".")[0]
        if name.endswith(_OUTPUTS) and module in layers:
            raise LoadError(
                f"load.recognise: {name}: expected none beside {layers[module][0]}: a layer is quantized or it is not; "
                "remove one of them"
            )
    return Plan(producer, layers, copied)


def _producer(names: list[str], config: Mapping[str, Any] | None) -> Producer:
    by_name = {producer.name: producer for producer in PRODUCERS}
    if config is not None:
        method = config.get("quant_method")
        if method not in by_name:
            raise LoadError(
                f"load.recognise: quant_method: expected one of {', '.join(by_name)}, got {method!r}; dequantize the "
                "model with its own library, and use `pyquant quantize`"
            )
        return by_name[method]
    found = [p for p in PRODUCERS if any(name.endswith(end) for name in names for end in p.markers)]
    if not found:
        raise LoadError(f"load.recognise: expected quantized layers of {', '.join(by_name)}, got none")
    marker = next((producer.markers[0] for producer in found if producer.needs_config), None)
    if marker is not None:
        raise LoadError(
            f"load.recognise: tensors called *{marker}: expected config.json with a quantization_config, got none"
        )
    if len(found) > 1:
        examples = [next(n for n in names for end in p.markers if n.endswith(end)) for p in found]
        raise LoadError(
            f"load.recognise: expected one format, got {' and '.join(p.name for p in found)} ({', '.join(examples)}); "
            "dequantize the layers of all but one"
        )
    return found[0]
