"""Golden file of compressed-tensors: ``pip install --no-deps compressed-tensors loguru``, then run this (CPU)."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from golden import write

# name: (bits, symmetric, group size, scale dtype, N, K)
INTEGERS = {
    "4bit_sym": (4, True, 32, torch.bfloat16, 8, 64),
    "4bit_asym": (4, False, 32, torch.float16, 12, 64),
    "4bit_channel": (4, True, -1, torch.float16, 8, 44),
    "8bit_sym": (8, True, 32, torch.bfloat16, 8, 64),
    "3bit_sym": (3, True, 32, torch.bfloat16, 8, 64),
    "3bit_asym": (3, False, 32, torch.float16, 7, 64),
    "2bit_asym": (2, False, 16, torch.float16, 8, 64),
    "6bit_sym": (6, True, 32, torch.float16, 8, 64),
}


def scheme(**arguments: object) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))


def store(name: str, state: dict[str, torch.Tensor], expected: torch.Tensor, **settings: object) -> None:
    for key, value in state.items():
        tensors[f"{name}.{key}"] = value.detach()
    tensors[f"expected.{name}.{str(expected.dtype).removeprefix('torch.')}"] = expected.detach()
    cases[name] = settings


torch.manual_seed(0)
tensors: dict[str, torch.Tensor] = {}
cases: dict[str, dict[str, object]] = {}
for name, (bits, symmetric, group_size, dtype, n, k) in INTEGERS.items():
    arguments = dict(num_bits=bits, type="int", symmetric=symmetric)
    arguments |= dict(strategy="channel") if group_size == -1 else dict(strategy="group", group_size=group_size)
    groups = 1 if group_size == -1 else k // group_size
    half = 1 << (bits - 1)
    scale = (torch.rand(n, groups) * 0.02 + 0.01).to(dtype)
    state = {"weight": torch.randn(n, k).to(dtype) * 0.05, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-half, half, (n, groups), dtype=torch.int8)
    packed = PackedQuantizationCompressor.compress(state, scheme(**arguments))
    expected = PackedQuantizationCompressor.decompress(packed, scheme(**arguments))["weight"]
    store(name, packed, expected, num_bits=bits, group_size=group_size, symmetric=symmetric)

fp4 = scheme(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
for name, global_scale in {"nvfp4": 2688.0 / 3.7, "nvfp4_power_of_two": 512.0, "nvfp4_other": 391.4}.items():
    scale = torch.randint(1, 0x7F, (8, 4), dtype=torch.uint8).view(torch.float8_e4m3fn)
    divisor = torch.tensor([global_scale])
    w = torch.randn(8, 64) * scale.float().repeat_interleave(16, dim=1) / global_scale * 3
    state = {"weight": w, "weight_scale": scale.float(), "weight_global_scale": divisor}
    packed = NVFP4PackedCompressor.compress(state, fp4)
    packed["weight_scale"] = packed["weight_scale"].to(torch.float8_e4m3fn)
    store(name, packed, NVFP4PackedCompressor.decompress(packed, fp4)["weight"], format="nvfp4")

mx = scheme(num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8)
scale = torch.exp2(torch.randint(-8, 4, (8, 2)).float())
state = {"weight": torch.randn(8, 64) * scale.repeat_interleave(32, dim=1) * 3, "weight_scale": scale}
packed = MXFP4PackedCompressor.compress(state, mx)
store("mxfp4", packed, MXFP4PackedCompressor.decompress(packed, mx)["weight"], format="mxfp4")
write("compressed_tensors", tensors, cases, "compressed-tensors")
