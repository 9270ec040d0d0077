"""Golden file of HQQ: ``pip install hqq``, then ``python make_hqq.py`` (CPU)."""

from __future__ import annotations

import torch
from golden import write
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn

# name: (bits, group size, axis, view as float, compute dtype, N, K)
CASES = {
    "4bit": (4, 32, 1, False, torch.float16, 8, 64),
    "4bit_bfloat16": (4, 64, 1, False, torch.bfloat16, 8, 64),
    "4bit_view_as_float": (4, 32, 1, True, torch.float16, 8, 64),
    "4bit_channel": (4, None, 1, False, torch.float16, 8, 48),
    "3bit": (3, 32, 1, False, torch.float16, 11, 64),
    "3bit_float32": (3, 16, 1, False, torch.float32, 8, 64),
    "2bit": (2, 16, 1, False, torch.float16, 8, 64),
    "1bit": (1, 32, 1, False, torch.float16, 8, 64),
    "axis_0": (4, 64, 0, False, torch.float16, 8, 64),
    "8bit": (8, 64, 1, False, torch.float16, 8, 64),
}

torch.manual_seed(0)
tensors, cases = {}, {}
for name, (bits, group_size, axis, view_as_float, compute_dtype, n, k) in CASES.items():
    config = BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=axis, view_as_float=view_as_float)
    layer = HQQLinear(nn.Linear(k, n), config, compute_dtype=compute_dtype, device="cpu", initialize=True)
    state = {key: value for key, value in layer.state_dict().items() if value is not None}
    for key, value in state.items():
        tensors[f"{name}.{key}"] = value.detach()
    dtype = str(compute_dtype).removeprefix("torch.")
    tensors[f"expected.{name}.{dtype}"] = layer.dequantize().detach()
    # The same stored values in fp32 arithmetic, which rounds once.
    meta = dict(
        layer.meta, compute_dtype=torch.float32, scale=layer.meta["scale"].float(), zero=layer.meta["zero"].float()
    )
    if bits == 3 and group_size is None:
        meta["group_size"] = k
    tensors[f"expected.{name}.float32"] = Quantizer.dequantize(layer.W_q.detach(), meta)
    cases[name] = {"bits": bits, "group_size": group_size, "axis": axis, "dtype": dtype}
write("hqq", tensors, cases, "hqq")
