"""Mixed-input GEMM: ``y = x @ dequant(W)^T + b`` with weights in 2 to 8 bits, dequantized inside the GEMM."""

from . import functional, nn
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
    "nn",
    "quantize",
    "quantize_model",
]
