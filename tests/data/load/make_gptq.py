"""Golden file of GPTQ: ``pip install gptqmodel``, then ``python make_gptq.py`` (CPU)."""

from __future__ import annotations

import torch
from golden import write
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from torch import nn

# name: (bits, symmetric, act-order, group size, v1, N, K)
CASES = {
    "v1_sym": (4, True, False, 32, True, 32, 64),
    "v2_sym": (4, True, False, 32, False, 32, 64),
    "v1_asym": (4, False, False, 32, True, 32, 64),
    "v2_asym": (4, False, False, 32, False, 32, 64),
    "v2_channel": (4, True, False, -1, False, 32, 64),
    "v1_sym_act_order": (4, True, True, 32, True, 32, 96),
    "v2_asym_act_order": (4, False, True, 32, False, 32, 96),
    "v2_2bit_asym": (2, False, False, 32, False, 32, 64),
    "v1_3bit_sym": (3, True, False, 32, True, 32, 64),
    "v2_3bit_asym": (3, False, False, 32, False, 32, 64),
    "v2_8bit_sym": (8, True, False, 32, False, 32, 64),
}


class Config:
    """What the conversion to v1 asks of a quantization config."""

    def __init__(self, bits: int) -> None:
        self.bits, self.pack_dtype = bits, torch.int32


torch.manual_seed(0)
tensors, cases = {}, {}
for name, (bits, symmetric, act_order, group_size, v1, n, k) in CASES.items():
    size = k if group_size == -1 else group_size
    groups = k // size
    scales = (torch.rand(n, groups) * 0.02 + 0.01).half().float()
    middle = float(1 << (bits - 1))
    # v1 cannot hold zero points of 0: they are stored less one.
    zeros = torch.full((n, groups), middle) if symmetric else torch.randint(1, 1 << bits, (n, groups)).float()
    g_idx = torch.arange(k, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    codes = torch.randint(0, 1 << bits, (n, k)).float()
    linear = nn.Linear(k, n)
    linear.weight.data = (codes - zeros[:, g_idx.long()]) * scales[:, g_idx.long()]
    linear.half()
    module = TorchLinear(
        bits=bits, group_size=group_size, sym=symmetric, desc_act=act_order, in_features=k, out_features=n,
        bias=True, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    module.pack_original(linear, scales, zeros.clone(), g_idx)
    module.post_init()
    module.dequant_dtype = torch.int16
    expected = module.dequantize_weight().t().half()
    if v1:
        convert_gptq_v2_to_v1_format_module(module, Config(bits))
    for part in ("qweight", "qzeros", "scales", "g_idx", "bias"):
        tensors[f"{name}.{part}"] = getattr(module, part)
    tensors[f"expected.{name}.float16"] = expected
    cases[name] = {
        "bits": bits, "group_size": group_size, "checkpoint_format": "gptq" if v1 else "gptq_v2",
        "symmetric": symmetric, "act_order": act_order,
    }  # fmt: skip
write("gptq", tensors, cases, "gptqmodel")
