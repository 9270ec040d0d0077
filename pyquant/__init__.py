"""Mixed-input GEMM: ``y = x @ dequant(W)^T + b`` with weights in 2 to 8 bits, dequantized inside the GEMM."""

import os as _os

from . import functional, load, nn
from ._library import load_table
from ._version import __version__
from .accelerate import Acceleration, accelerate
from .nn import quantize_model
from .ops import Explanation, explain, linear
from .quantize import quantize
from .weight import PackedWeight, QuantizedWeight

__all__ = [
    "Acceleration",
    "Explanation",
    "PackedWeight",
    "QuantizedWeight",
    "__version__",
    "accelerate",
    "explain",
    "functional",
    "linear",
    "load",
    "load_table",
    "nn",
    "quantize",
    "quantize_model",
]

# A user's own dispatch table; a file that is none stops the import, with its line.
if "PYQUANT_TABLE" in _os.environ:
    load_table(_os.environ["PYQUANT_TABLE"])
