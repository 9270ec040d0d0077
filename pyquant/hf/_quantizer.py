"""``PyquantHfQuantizer``: what transformers asks while it loads, saves and dequantizes a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers import HfQuantizer

from ..checkpoint import settings
from ..formats import FORMATS, ScaleType, ZeroType
from ..quantize import check_settings
from ..scales import storage_dtype
from ._checkpoint import checkpoint_targets, load_conversions
from ._config import PyquantConfig
from ._install import finish, quantized_layers, uninstall
from ._operations import PyquantDeserialize, PyquantQuantize
from ._targets import Target, check_skip_list, wanted_targets


class PyquantHfQuantizer(HfQuantizer):
    """Quantizes the linear layers and fused experts of a model while it is loaded, or loads quantized ones.

    Modules are replaced as their weights come: until then the model is as transformers builds it, on the meta device.

    Attributes:
        targets: the parameters that are quantized weights, by name; empty before the model is built.
        listed: for each, what config.json says of its weights.
    """

    requires_calibration = False
    quantization_config: PyquantConfig

    def __init__(self, quantization_config: PyquantConfig, **arguments: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **arguments)  # what is loaded is noted in it
        self.targets: dict[str, Target] = {}
        self.listed: dict[str, list[dict[str, Any]]] = {}
        self._errors: list[str] = []
        self._files: list[str] = []
        self._bytes_per_weight: dict[str, float] = {}

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of :func:`pyquant.quantize`."""
        return self.quantization_config.arguments

    @contextmanager
    def collect_errors(self, name: str) -> Iterator[None]:
        """Keep a ValueError about a parameter until the loader is done: it would hide it behind one of its own."""
        try:
            yield
        except ValueError as error:
            self._errors.append(f"pyquant: {name}: {error}")

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Refuse offloading: hooks would move parameters back and forth, and packed weights are buffers."""
        if self.pre_quantized and not self.quantization_config.modules:
            raise ValueError(
                "PyquantConfig: modules: config.json lists no quantized modules; "
                "expected one that save_pretrained or `pyquant convert` wrote"
            )
        if not isinstance(device_map, dict):
            return
        devices = {getattr(device, "type", str(device)) for device in device_map.values()}
        if "disk" in devices or ("cpu" in devices and len(devices) > 1):
            offloaded = [name for name, d in device_map.items() if getattr(d, "type", str(d)) in ("cpu", "disk")]
            raise ValueError(
                f"PyquantConfig: device_map: {offloaded[0]!r} would be offloaded to {device_map[offloaded[0]]}, "
                "which quantized layers do not support; place all modules on GPUs, or all on the CPU"
            )

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Refuse tensor parallelism by transformers' plan: it cuts tensors before they are quantized weights."""
        distributed = getattr(model.config, "distributed_config", None)
        if (getattr(distributed, "tp_size", None) or 1) > 1:
            raise ValueError("PyquantConfig: expected no tp_plan: transformers' sharding cannot cut quantized weights")

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        config = self.quantization_config
        self._files = [file for file in checkpoint_files or () if file.endswith(".safetensors")]
        if self.pre_quantized:
            return  # update_weight_conversions knows the names
        check_skip_list(model, config.modules_to_not_convert or ())
        skip = self.get_modules_to_not_convert(model, config.modules_to_not_convert, model._keep_in_fp32_modules)
        self.targets = wanted_targets(model, skip, keep_routers=config.modules_to_not_convert is None)
        self._bytes_per_weight = {name: self._check_target(target) for name, target in self.targets.items()}

    def _check_target(self, target: Target) -> float:
        try:
            return _bytes_per_weight(settings(check_settings(**self.arguments, k=target.k)))
        except ValueError as error:
            raise ValueError(
                f"PyquantConfig: {target.name}, K={target.k}: {str(error).removeprefix('quantize: ')}; "
                "choose another group_size, or add the module to modules_to_not_convert"
            ) from error

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], model: Any) -> list[WeightTransform]:
        """Collect the tensors of quantized weights; the names of modules are known here."""
        if not self.pre_quantized:
            return weight_conversions
        conversions = load_conversions(self, weight_conversions, model)
        modules = self.quantization_config.modules or {}
        found = checkpoint_targets(modules, self._files, conversions, model)
        self.targets = {target.name: target for target in found}
        self.listed = {target.name: [modules[name] for name in names] for target, names in found.items()}
        mean = sum(_bytes_per_weight(about) for about in modules.values()) / len(modules)
        self._bytes_per_weight = dict.fromkeys(self.targets, mean)
        return conversions

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether the parameter is, or becomes, a quantized weight."""
        return param_name in self.targets

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes per weight, for device maps and for what is allocated in advance."""
        return self._bytes_per_weight.get(param_name) or param.element_size()

    def get_quantize_ops(self) -> PyquantQuantize:
        """What quantizes a weight."""
        return PyquantQuantize(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._errors:
            more = f"\n({len(self._errors)} such errors)" if len(self._errors) > 1 else ""
            raise ValueError(self._errors[0] + more)
        finish(model)
        self._check_all_loaded(model)
        config = self.quantization_config
        config.modules = {name: settings(layer.weight) for name, layer in quantized_layers(model).items()}
        # Those that merge or split full-precision weights would take quantized ones for theirs when the model is saved.
        keys = [f"{name}.weight" for name in config.modules]
        model._weight_conversions = [c for c in model._weight_conversions if not _touches(c, keys)]
        return model

    def _check_all_loaded(self, model: Any) -> None:
        parameters = dict(model.named_parameters())
        missing = [name for name in self.targets if name in parameters]
        if missing and self.pre_quantized:
            raise ValueError(
                f"pyquant: {missing[0]}: expected a quantized weight in the checkpoint, got none "
                f"({len(missing)} missing in all); the checkpoint is incomplete: download or convert it again"
            )
        if missing:
            warnings.warn(
                f"pyquant: not in the checkpoint, newly initialized, and so not quantized: {', '.join(missing)}",
                stacklevel=2,
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        # save_pretrained leaves a name in the model's config.
        to = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        unquantized = dict(model.named_parameters())
        for name, target in self.targets.items():
            if name not in unquantized:
                uninstall(model, target, to)
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes what from_pretrained reads, bit for bit."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients reach adapters and biases; the quantized weights have none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile by itself, which it does for CUDA graphs: the loop over experts waits."""
        return all(target.experts is None for target in self.targets.values())


def _touches(conversion: WeightTransform, keys: list[str]) -> bool:
    """Whether a conversion, reversed, would convert one of the keys."""
    if not isinstance(conversion, WeightConverter):
        return False
    if isinstance(conversion.operations[0], PyquantDeserialize):
        return True
    reverse = conversion.reverse_transform()
    return any(reverse.rename_source_key(key)[1] is not None for key in keys)


def _bytes_per_weight(about: dict[str, Any]) -> float:
    """Of codes, scales and zeros, as ``checkpoint.settings`` describes them."""
    fmt = FORMATS[about["format"]]
    scale = storage_dtype(ScaleType[about["scale_type"].upper()]).itemsize
    zero = {ZeroType.NONE: 0, ZeroType.INTEGER: 1, ZeroType.FLOAT: scale}[ZeroType[about["zero_type"].upper()]]
    return fmt.bits / 8 + (scale + zero) / about["group_size"]
