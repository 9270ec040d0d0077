"""What a loader returns, and how it reads the tensors of one layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..weight import QuantizedWeight


class LoadError(ValueError):
    """Tensors that are no weight of the format they claim. The message names the loader, the tensor, what is wrong."""


@dataclass(frozen=True)
class LoadedLayer:
    """A linear layer of a checkpoint.

    Attributes:
        weight: the canonical weight [N, K].
        bias: [N] as stored, or None.
        permutation: int64 [K] for act-order (GPTQ ``desc_act``), else None. Column ``j`` of ``weight`` is column
            ``permutation[j]`` of the layer's weight, so ``y = x[..., permutation] @ weight^T``.
    """

    weight: QuantizedWeight
    bias: torch.Tensor | None = None
    permutation: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The layer's weight [N, K] in ``dtype``, columns in the order of the layer's inputs."""
        w = self.weight.dequantize(dtype)
        if self.permutation is None:
            return w
        out = torch.empty_like(w)
        out[:, self.permutation] = w
        return out


class Parts:
    """The tensors of one layer, ``<prefix>.<name>`` of a state dict, checked as they are read."""

    def __init__(self, function: str, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        self._function = function
        self._tensors = tensors
        self._prefix = prefix + "." if prefix else ""
        self._device: tuple[str, torch.device] | None = None  # of the first tensor

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def refuse(self, name: str, message: str) -> NoReturn:
        """Raise :class:`LoadError` about one tensor or setting."""
        raise LoadError(f"load.{self._function}: {self._prefix}{name}: {message}")

    def find(self, names: Sequence[str]) -> str:
        """The one of ``names`` that is there."""
        for name in names:
            if name in self:
                return name
        self.refuse(names[0], f"expected a tensor called {' or '.join(names)}, got none")

    def get(
        self,
        name: str,
        dtypes: Sequence[torch.dtype] | torch.dtype,
        shape: Sequence[int | None] | None = None,
        *,
        any_device: bool = False,
    ) -> torch.Tensor:
        """A tensor of one of ``dtypes`` and of ``shape``, where None stands for any length; contiguous.

        It must be where the layer's other tensors are, unless it is a setting (``any_device``).
        """
        if name not in self:
            self.refuse(name, "expected a tensor, got none: the checkpoint is incomplete")
        tensor = self._tensors[self._prefix + name].detach()
        allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
        fits = shape is None or (
            tensor.dim() == len(shape)
            and all(want is None or want == got for want, got in zip(shape, tensor.shape, strict=True))
        )
        if tensor.dtype not in allowed or not fits:
            want = " or ".join(str(d).removeprefix("torch.") for d in allowed)
            size = "" if shape is None else " [" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
            got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            self.refuse(name, f"expected {want}{size}, got {got}")
        if not any_device:
            first, device = self._device = self._device or (name, tensor.device)
            if tensor.device != device:
                self.refuse(name, f"expected a tensor on {device}, where {first} is, got one on {tensor.device}")
        return tensor.contiguous()

    def finite(
        self, name: str, dtypes: Sequence[torch.dtype] | torch.dtype, shape: Sequence[int | None] | None = None
    ) -> torch.Tensor:
        """As :meth:`get`, of finite values."""
        tensor = self.get(name, dtypes, shape)
        if not bool(torch.isfinite(tensor).all()):
            self.refuse(
                name, "expected finite values, got NaN or Inf: damaged; download the model or quantize it again"
            )
        return tensor

    def raw(self, name: str) -> Any:
        """A stored setting as it is: a tensor, a Python value, or None."""
        return self._tensors.get(self._prefix + name)

    def value(self, name: str) -> object:
        """A stored setting: the Python number of a tensor of one element, else the text of its bytes."""
        stored = self.raw(name)
        if not isinstance(stored, torch.Tensor):
            return stored
        if stored.dim() == 0 or stored.numel() == 1:
            return stored.item()
        return bytes(stored.to(torch.uint8).reshape(-1).tolist()).decode("ascii", "replace")

    def bias(self, n: int) -> torch.Tensor | None:
        """The bias [N], if there is one."""
        return self.get("bias", FLOATS, (n,)) if "bias" in self else None

    def checked(self, weight: QuantizedWeight) -> QuantizedWeight:
        """``weight``, whose fields fit each other and its format."""
        try:
            weight.check()
        except ValueError as error:
            self.refuse("weight", str(error).removeprefix("QuantizedWeight: "))
        return weight


FLOATS = (torch.float16, torch.bfloat16, torch.float32)
