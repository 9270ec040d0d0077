"""Golden file of torchao: ``pip install torchao``, then ``python make_torchao.py`` (CPU).

Scales, zeros and codes come from torchao's own tinygemm primitives, names and metadata from its safetensors support;
expected weights from its dequantization in fp32. Its tile-packed layout is that of make_tinygemm.py.
"""

from __future__ import annotations

import json

import torch
from golden import write
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization.quant_primitives import (
    MappingType,
    _choose_qparams_affine_tinygemm,
    _dequantize_affine_tinygemm,
    _quantize_affine_tinygemm,
)
from torchao.quantization.quantize_.workflows import Int4Tensor

N, K = 8, 128
torch.manual_seed(0)
tensors, cases = {}, {}
for name, group_size, symmetric in (("plain", 32, False), ("plain_channel", K, False), ("plain_symmetric", 32, True)):
    w, block = torch.randn(N, K).bfloat16(), (1, group_size)
    if symmetric:
        scale = (w.float().reshape(N, -1, group_size).abs().amax(-1) / 7).bfloat16()
        zero = torch.zeros_like(scale)
    else:
        scale, zero = _choose_qparams_affine_tinygemm(
            w, MappingType.ASYMMETRIC, block, torch.int32, 0, 15, scale_dtype=torch.bfloat16,
            zero_point_dtype=torch.bfloat16,
        )  # fmt: skip
        scale, zero = scale.reshape(N, -1), zero.reshape(N, -1)
    codes = _quantize_affine_tinygemm(w, block, scale, zero, torch.int32, quant_min=0, quant_max=15)
    signed = (codes - 8).to(torch.int8)
    qdata = (signed[:, ::2] & 0xF) | (signed[:, 1::2] << 4)
    weight = Int4Tensor(qdata, scale.t().contiguous(), zero.t().contiguous(), [1, group_size], torch.Size((N, K)))
    flat, metadata = flatten_tensor_state_dict({f"{name}.weight": weight, f"{name}.bias": torch.randn(N)})
    tensors |= flat
    expected = _dequantize_affine_tinygemm(
        codes, block, scale, zero, torch.int32, quant_min=0, quant_max=15, output_dtype=torch.float32
    )
    tensors[f"expected.{name}.float32"] = expected
    cases[name] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "kind": json.loads(metadata[f"{name}.weight"])["_type"],
    }
write("torchao", tensors, cases, "torchao")
