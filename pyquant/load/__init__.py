"""Checkpoints of other projects as canonical weights; none of those projects need be installed.

Each function takes a state dict, its tensors in the dtypes and shapes in which the producer stores them, and the name
of a layer. ``docs/loading.md`` says for each format what is exact, and what is refused and why.
"""

from ._awq import awq
from ._bitsandbytes import bitsandbytes
from ._compressed_tensors import compressed_tensors
from ._fp4 import mxfp4, mxfp4_experts, nvfp4
from ._gptq import gptq
from ._hqq import hqq
from ._layer import LoadedLayer, LoadError
from ._registry import PRODUCERS, Plan, Producer, Settings, recognise
from ._torchao import tinygemm, torchao

__all__ = [
    "PRODUCERS",
    "LoadError",
    "LoadedLayer",
    "Plan",
    "Producer",
    "Settings",
    "awq",
    "bitsandbytes",
    "compressed_tensors",
    "gptq",
    "hqq",
    "mxfp4",
    "mxfp4_experts",
    "nvfp4",
    "recognise",
    "tinygemm",
    "torchao",
]
