"""``QuantLinear``, and the conversion of a model's linear layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ._module_path import prefix_path
from .ops import gemm, op_arguments
from .quantize import quantize
from .weight import PackedWeight, QuantizedWeight

_PREFIX = "weight."
_PERMUTATION = "permutation"


class QuantLinear(nn.Module):
    """A linear layer with a packed weight: ``y = x @ dequant(weight)^T + bias``.

    Made by :meth:`from_linear` or :meth:`from_quantized`. The packed tensors are buffers, so they follow
    ``.to(device)``; ``.to(dtype)`` changes the bias only. ``state_dict`` holds the canonical weight
    (``QuantizedWeight.state_dict`` under ``weight.``), the bias and the permutation; ``load_state_dict`` takes the
    same, of any format and group size.

    Attributes:
        permutation: int64 [K] for act-order (GPTQ ``desc_act``), else None: column ``j`` of ``weight`` belongs to input
            ``permutation[j]``, so that ``y = x[..., permutation] @ dequant(weight)^T + bias``.
    """

    is_parallel = False  # whether the weight is one rank's part: pyquant.parallel
    bias: nn.Parameter | None
    permutation: torch.Tensor | None

    def __init__(
        self, weight: PackedWeight, bias: torch.Tensor | None = None, permutation: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        if permutation is not None:
            _check_permutation(permutation, weight.k, _PERMUTATION)
        self._set_weight(weight)
        self._set_permutation(permutation)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad))

    @classmethod
    def from_linear(cls, module: nn.Linear, format: str = "nf4", **arguments: Any) -> QuantLinear:
        """Quantize ``module``'s weight; ``arguments`` are those of :func:`pyquant.quantize`."""
        weight = quantize(module.weight.detach(), format, **arguments)
        bias: torch.Tensor | None = None
        if module.bias is not None:
            bias = module.bias.detach().clone().requires_grad_(module.bias.requires_grad)
        return cls.from_quantized(weight, bias).train(module.training)

    @classmethod
    def from_quantized(
        cls, weight: QuantizedWeight, bias: torch.Tensor | None = None, permutation: torch.Tensor | None = None
    ) -> QuantLinear:
        """A layer of a canonical weight; of a ``LoadedLayer``: its ``weight``, ``bias`` and ``permutation``.

        Raises:
            ValueError: when ``permutation`` is none of K inputs.
        """
        return cls(weight.pack(), bias, permutation)

    @property
    def weight(self) -> PackedWeight:
        """The packed weight."""
        return PackedWeight(*self._spec, **{name: getattr(self, "_" + name) for name in self._names})

    @property
    def in_features(self) -> int:
        return self._spec[2]

    @property
    def out_features(self) -> int:
        return self._spec[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # As pyquant.linear(x, self.weight, self.bias), without building a PackedWeight in every call.
        b = self._buffers
        permutation = b[_PERMUTATION]
        bias: torch.Tensor | None = self._parameters["bias"]
        spec, n, k = self._integers
        try:
            if permutation is not None:
                x = permute(x, permutation)
            if bias is not None and bias.dtype != x.dtype:
                bias = bias.to(x.dtype)  # as bitsandbytes does; the weight takes any activation dtype
            return gemm(
                x, b["_codes"], b["_scales"], b.get("_zeros"), b.get("_codebook"), b.get("_scale_data"),
                bias, spec, n, k,
            )  # fmt: skip
        except RuntimeError as error:
            prefix_path(error, self)
            raise

    def extra_repr(self) -> str:
        act_order = ", act_order=True" if self.permutation is not None else ""
        return f"{self.weight!r}, bias={self.bias is not None}{act_order}"

    def _set_weight(self, weight: PackedWeight) -> None:
        w = weight
        self._spec = (w.format, w.n, w.k, w.group_size, w.scale_type, w.zero_type)
        _, self._integers = op_arguments(w)
        self._names = tuple(w.tensors())
        for name in [b for b in self._buffers if b.startswith("_")]:
            del self._buffers[name]
        for name, tensor in w.tensors().items():
            self.register_buffer("_" + name, tensor, persistent=False)

    def _set_permutation(self, permutation: torch.Tensor | None) -> None:
        if permutation is not None:
            permutation = permutation.to(self._buffers["_codes"].device)  # type: ignore[union-attr]
        self._buffers.pop(_PERMUTATION, None)
        self.register_buffer(_PERMUTATION, permutation, persistent=False)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        # Scales and codebooks are part of the stored weight: .half() and .to(dtype) must not round them. As bytes
        # they are left alone.
        dtypes = {"_" + name: getattr(self, "_" + name).dtype for name in self._names}
        shapes = {name: self._buffers[name].shape for name in dtypes}  # type: ignore[union-attr]
        for name in dtypes:
            self._buffers[name] = self._buffers[name].reshape(-1).view(torch.uint8)  # type: ignore[union-attr]
        try:
            super()._apply(fn, recurse)
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self._buffers[name].view(dtype).view(shapes[name])  # type: ignore[union-attr]
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.weight.unpack().state_dict(prefix + _PREFIX))
        if self.permutation is not None:
            destination[prefix + _PERMUTATION] = self.permutation

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = prefix + _PREFIX
        canonical = {name: state_dict[name] for name in list(state_dict) if name.startswith(own)}
        permutation = state_dict.get(prefix + _PERMUTATION)
        rest = {name: t for name, t in state_dict.items() if name not in canonical and name != prefix + _PERMUTATION}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if not canonical:
            missing_keys.append(own + "quant_spec")
            if permutation is not None:
                unexpected_keys.append(prefix + _PERMUTATION)
            return
        known = {own + name for name in (*QuantizedWeight.TENSORS, "quant_spec")}
        unexpected_keys += [name for name in canonical if name not in known and strict]
        try:
            weight = QuantizedWeight.from_state_dict(canonical, own)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        if weight.shape != self.weight.shape:
            error_msgs.append(
                f"QuantLinear: {own}quant_spec: expected a weight of {list(self.weight.shape)}, "
                f"got {list(weight.shape)}"
            )
            return
        if permutation is not None:
            try:
                _check_permutation(permutation, weight.k, prefix + _PERMUTATION)
            except ValueError as error:
                error_msgs.append(str(error))
                return
        self._set_weight(weight.pack(self.weight.device))
        self._set_permutation(permutation)


def permute(x: torch.Tensor, permutation: torch.Tensor) -> torch.Tensor:
    """``x[..., permutation]``; an x of another K as it is, for ``gemm`` to refuse: a gather takes a wider one."""
    return x.index_select(-1, permutation) if x.shape[-1:] == permutation.shape else x


def _check_permutation(permutation: torch.Tensor, k: int, name: str) -> None:
    if permutation.dtype != torch.int64 or permutation.shape != (k,):
        got = f"{permutation.dtype} {list(permutation.shape)}"
        raise ValueError(f"QuantLinear: {name}: expected torch.int64 [{k}], got {got}")
    natural = torch.arange(k, device=permutation.device)
    if not permutation.is_meta and not torch.equal(permutation.sort().values, natural):
        raise ValueError(f"QuantLinear: {name}: expected every number from 0 to {k - 1} once")


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    **arguments: Any,
) -> nn.Module:
    """Replace the ``nn.Linear`` modules of ``model`` by :class:`QuantLinear`, in place.

    Args:
        model: any module; a bare ``nn.Linear`` is returned as a new module.
        format: a name of ``pyquant.formats.FORMATS``.
        include: glob patterns of module names to convert; empty for all.
        exclude: glob patterns of module names to keep.
        arguments: those of :func:`pyquant.quantize`.

    Returns:
        ``model``.

    Raises:
        ValueError: when nothing matched, or as :func:`pyquant.quantize`.
    """
    include, exclude = tuple(include), tuple(exclude)

    def wanted(name: str) -> bool:
        matches = [fnmatch.fnmatchcase(name, pattern) for pattern in include]
        return (not include or any(matches)) and not any(fnmatch.fnmatchcase(name, p) for p in exclude)

    if isinstance(model, nn.Linear):
        return QuantLinear.from_linear(model, format, **arguments)
    found = {
        name: m for name, m in model.named_modules(remove_duplicate=False) if type(m) is nn.Linear and wanted(name)
    }
    if not found:
        raise ValueError(f"quantize_model: no nn.Linear matches include={include}, exclude={exclude}")
    # All are converted before the first is replaced, so that an error leaves the model as it was. A module that stands
    # under two names is converted once and stays shared.
    converted = {m: QuantLinear.from_linear(m, format, **arguments) for m in dict.fromkeys(found.values())}
    for name, module in found.items():
        model.set_submodule(name, converted[module])
    return model
