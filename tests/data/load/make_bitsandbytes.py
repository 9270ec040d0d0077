"""Golden file of bitsandbytes: ``pip install bitsandbytes``, then ``python make_bitsandbytes.py`` (CPU).

Where blocks cross row ends, the compiled CPU kernel of bitsandbytes 0.50.2 starts a block at every row of even length,
which is not how its quantizer laid them: there the expected weight is that of its generic implementation.
"""

from __future__ import annotations

import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.nn import Params4bit
from golden import write

# name: (quant type, nested, blocksize, storage, N, K)
CASES = {
    "nf4": ("nf4", False, 64, torch.uint8, 4, 128),
    "fp4": ("fp4", False, 64, torch.uint8, 4, 128),
    "nf4_nested": ("nf4", True, 64, torch.uint8, 4, 128),
    "fp4_nested": ("fp4", True, 64, torch.uint8, 4, 128),
    "nf4_two_nested_blocks": ("nf4", True, 32, torch.uint8, 130, 64),
    "nf4_float16": ("nf4", False, 64, torch.float16, 2, 64),
    "nf4_nested_bfloat16": ("nf4", True, 64, torch.bfloat16, 2, 64),
    "nf4_float32": ("nf4", False, 64, torch.float32, 2, 64),
    "fp4_float32": ("fp4", False, 128, torch.float32, 2, 128),
    "nf4_blocks_cross_rows": ("nf4", False, 64, torch.uint8, 6, 48),
    "nf4_nested_blocks_cross_rows": ("nf4", True, 32, torch.uint8, 6, 40),
    "nf4_odd_k": ("nf4", False, 64, torch.uint8, 5, 33),
}
LARGE = "nf4_two_nested_blocks"  # expected in one dtype only, to keep the file small


def dequantize(data: torch.Tensor, state: bnb.QuantState, dtype: torch.dtype) -> torch.Tensor:
    if state.shape[1] % state.blocksize == 0:
        state.dtype = dtype
        return bnb.dequantize_4bit(data, state)
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    flat = data.view(torch.uint8).reshape(-1)
    return _dequantize_4bit_compute(flat, absmax, state.code, state.blocksize, state.shape, dtype)


torch.manual_seed(0)
tensors, cases = {}, {}
for name, (quant_type, nested, blocksize, storage, n, k) in CASES.items():
    w = torch.randn(n, k)
    w[0, :4] = 0
    data, state = bnb.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    weight = Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=blocksize, compress_statistics=nested,
        quant_type=quant_type, quant_storage=storage, bnb_quantized=True,
    )  # fmt: skip
    tensors[f"{name}.weight"] = weight.data
    for key, value in state.as_dict(packed=True).items():
        tensors[f"{name}.weight.{key}"] = value
    tensors[f"{name}.bias"] = torch.randn(n)
    for dtype in (torch.bfloat16,) if name == LARGE else (torch.float32, torch.float16, torch.bfloat16):
        tensors[f"expected.{name}.{str(dtype).removeprefix('torch.')}"] = dequantize(data, state, dtype)
    cases[name] = {"format": quant_type, "nested": nested, "group_size": blocksize}
write("bitsandbytes", tensors, cases, "bitsandbytes")
