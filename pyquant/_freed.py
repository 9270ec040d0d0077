"""A tensor whose data is gone: every use says so."""

from __future__ import annotations

from typing import Any

import torch


class FreedTensor(torch.Tensor):
    """Shape, dtype and device of a tensor that was freed. Any operation on it but ``detach`` raises RuntimeError."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def like(tensor: torch.Tensor) -> FreedTensor:
        """In place of ``tensor``."""
        return torch.Tensor._make_wrapper_subclass(FreedTensor, tensor.shape, dtype=tensor.dtype, device=tensor.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> FreedTensor:
        if func is torch.ops.aten.detach.default:
            return cls.like(args[0])
        raise RuntimeError(
            f"{func}: this weight was freed by pyquant.accelerate(free_original=True); "
            "call restore_original() of the object that it returned"
        )

    def __deepcopy__(self, memo: Any) -> FreedTensor:
        return self.like(self)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FreedTensor({list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"
