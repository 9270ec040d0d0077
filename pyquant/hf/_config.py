"""``PyquantConfig``: what ``quantization_config`` of transformers says about a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint import CONFIG_VERSION, QUANT_METHOD
from ..formats import ScaleType, ZeroType, get_format
from ..quantize import Method, check_settings


class PyquantConfig(QuantizationConfigMixin):
    """How a model is quantized while transformers loads it, or how a checkpoint is quantized.

    Args:
        format: a name of ``pyquant.formats.FORMATS``. This and the next six are those of :func:`pyquant.quantize`;
            "nf4" unless ``modules`` say it.
        group_size: consecutive k that share a scale; -1 for K; None for the format's default.
        nested: store absmax in 8 bits.
        scale_type: how scales are stored; None for the format's default.
        zero_type: "integer" or "float", for formats with zero points.
        method: "rtn" or "hqq".
        codebook: [2^bits] values in units of absmax, in place of the format's own.
        modules_to_not_convert: modules that are not quantized: names, their ends, or regular expressions from the
            beginning of a name, as in other configurations of transformers. None for the output head, weights tied to
            others, the module that comes last, and routers of experts.
        version: of this configuration, written by ``save_pretrained`` and ``pyquant convert``, as the next two.
        modules: format and shape of each quantized weight of a checkpoint, by module name.
        converted_from: the producer of a checkpoint that was converted.

    Raises:
        ValueError: an unknown format or version, settings that no weight could have.
        TypeError: an unknown entry.
    """

    def __init__(
        self,
        format: str | None = None,
        group_size: int | None = None,
        nested: bool = False,
        *,
        scale_type: str | None = None,
        zero_type: str | None = None,
        method: Method = "rtn",
        codebook: torch.Tensor | Iterable[float] | None = None,
        modules_to_not_convert: Iterable[str] | None = None,
        version: int = CONFIG_VERSION,
        modules: Mapping[str, Mapping[str, Any]] | None = None,
        converted_from: str | None = None,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"PyquantConfig: quant_method: expected {QUANT_METHOD!r}, got {quant_method!r}")
        if version != CONFIG_VERSION:
            raise ValueError(
                f"PyquantConfig: version: expected {CONFIG_VERSION}, got {version!r}; "
                "if a newer pyquant wrote the checkpoint, upgrade pyquant"
            )
        if unknown:
            raise TypeError(f"PyquantConfig: expected no entry called {next(iter(unknown))!r}")
        if isinstance(modules_to_not_convert, str):
            raise TypeError(f"PyquantConfig: modules_to_not_convert: expected a list, got {modules_to_not_convert!r}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment, unused-ignore]  # transformers' enum has its own methods
        self.version = version
        self.format = format if format is not None or modules is not None else "nf4"
        self.group_size = group_size
        self.nested = nested
        self.scale_type = scale_type
        self.zero_type = zero_type
        self.method = method
        self.codebook = None if codebook is None else torch.as_tensor(codebook, dtype=torch.float32).tolist()
        self.modules_to_not_convert = None if modules_to_not_convert is None else list(modules_to_not_convert)
        self.modules = None if modules is None else {name: dict(about) for name, about in modules.items()}
        self.converted_from = converted_from
        self._check()

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of :func:`pyquant.quantize`."""
        names = ("format", "group_size", "nested", "scale_type", "zero_type", "method", "codebook")
        arguments = {name: getattr(self, name) for name in names}
        if self.codebook is not None:
            arguments["codebook"] = torch.tensor(self.codebook, device="cpu")  # models are built on the meta device
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json: the entries that say something."""
        entries = {name: value for name, value in super().to_dict().items() if value is not None}
        if self.format is None:  # the settings of each module stand under `modules`
            del entries["nested"], entries["method"]
        return entries

    def _check(self) -> None:
        for name, about in (self.modules or {}).items():
            try:
                get_format(about["format"], f"PyquantConfig: modules: {name}")
                ScaleType[about["scale_type"].upper()], ZeroType[about["zero_type"].upper()]
                n, k = about["shape"]
                int(n), int(k), int(about["group_size"])
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"PyquantConfig: modules: {name}: expected format, shape [N, K], group_size, scale_type and "
                    f"zero_type, got {about}"
                ) from error
        if self.format is not None:
            try:
                check_settings(**self.arguments)
            except ValueError as error:
                raise ValueError(f"PyquantConfig: {str(error).removeprefix('quantize: ')}") from error
