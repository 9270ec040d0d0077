"""Checkpoints of other projects as canonical weights; none of those projects need be installed.

Each function takes a state dict, its tensors in the dtypes and shapes in which the producer stores them, and the name
of a layer. ``docs/loading.md`` says for each format what is exact, and what is refused and why.
"""

from ._awq import awq
from ._bitsandbytes import bitsandbytes
from ._gptq import gptq
from ._layer import LoadedLayer, LoadError

__all__ = ["LoadError", "LoadedLayer", "awq", "bitsandbytes", "gptq"]
