"""Golden file of gpt-oss' MXFP4 experts: ``pip install transformers``, then ``python make_gpt_oss.py`` (CPU)."""

from __future__ import annotations

import torch
from golden import write
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

torch.manual_seed(0)
experts, n, k = 2, 16, 64
blocks = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
scales = torch.randint(110, 135, (experts, n, k // 32), dtype=torch.uint8)
tensors = {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}
tensors["mlp.experts.gate_up_proj_bias"] = torch.randn(experts, n).bfloat16()
weight = convert_moe_packed_tensors(blocks.clone(), scales.clone())
tensors["expected.mlp.experts.gate_up_proj.bfloat16"] = weight.transpose(1, 2)
write("gpt_oss", tensors, {"mlp.experts.gate_up_proj": {"experts": experts}}, "transformers")
