"""The rule that tells which tensors of a checkpoint are weights of linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from .._routers import ROUTERS
from ..checkpoint import StoredTensor

DEFAULT_EXCLUDES = ("*embed*", "*wte*", "*wpe*", "shared.*", "*norm*", "*lm_head*", *ROUTERS)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Selection:
    """2-D ``*.weight`` tensors of fp32, fp16 or bf16 that match an ``include`` glob and no ``exclude`` glob.

    A checkpoint does not say which tensors belong to linear layers, so names must: without ``include``,
    ``DEFAULT_EXCLUDES`` (in lower case) keep embeddings, norms, the output head and routers of experts as they
    are. Globs are matched against full names, such as ``encoder.layer.0.*``."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def picks(self, name: str, tensor: StoredTensor) -> bool:
        """Whether the tensor is to be quantized."""
        if not name.endswith(".weight") or len(tensor.shape) != 2 or tensor.dtype not in _DTYPES or tensor.nbytes == 0:
            return False
        if any(fnmatchcase(name, glob) for glob in self.exclude):
            return False
        if self.include:
            return any(fnmatchcase(name, glob) for glob in self.include)
        return not any(fnmatchcase(name.lower(), glob) for glob in DEFAULT_EXCLUDES)
