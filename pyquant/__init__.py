"""Mixed-input GEMM: ``y = x @ dequant(W)^T + b`` with weights in 2 to 8 bits, dequantized inside the GEMM."""

from . import functional, load, nn
from ._version import __version__
from .nn import quantize_model
from .ops import Explanation, explain, linear
from .quantize import quantize
from .weight import PackedWeight, QuantizedWeight

__all__ = [
    "Explanation",
    "PackedWeight",
    "QuantizedWeight",
    "__version__",
    "explain",
    "functional",
    "linear",
    "load",
    "nn",
    "quantize",
    "quantize_model",
]
