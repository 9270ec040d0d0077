"""Golden file of tinygemm's layout, torchao's tile-packed one: ``python make_tinygemm.py`` on an NVIDIA GPU (sm_80 up).

torch alone makes it, since torchao's ``Int4TilePackedTo4dTensor`` calls the same operator. Names are those under which
torchao stores the tensor; ``codes`` is what the operator packed: [N, K / 2], the even k in the high nibble. Expected
weights are the kernel's own: each product with the identity has one term that is not 0, the bf16 weight.
"""

from __future__ import annotations

import torch
from golden import write

# name: (inner k-tiles, group size, N, K, all zero points 0)
CASES = {
    "tiles8_group32": (8, 32, 16, 256, False),
    "tiles8_group64": (8, 64, 8, 384, False),
    "tiles8_group128": (8, 128, 16, 256, False),
    "tiles8_symmetric": (8, 128, 8, 256, True),
    "tiles4_group64": (4, 64, 24, 192, False),
    "tiles2_group32": (2, 32, 8, 160, False),
    "tiles2_symmetric": (2, 32, 8, 160, True),
}
generator = torch.Generator().manual_seed(0)
tensors, cases = {}, {}
for name, (tiles, group_size, n, k, symmetric) in CASES.items():
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(k // group_size, n, generator=generator) * 0.1 + 0.01
    zeros = torch.randn(k // group_size, n, generator=generator) * 0.2 * (not symmetric)
    both = torch.stack([scales, zeros], dim=-1).bfloat16().cuda()
    packed = torch.ops.aten._convert_weight_to_int4pack(codes.cuda(), tiles)
    identity = torch.eye(k, dtype=torch.bfloat16, device="cuda")
    weight = torch.ops.aten._weight_int4pack_mm(identity, packed, group_size, both).t()
    tensors |= {
        f"{name}._weight_qdata": packed.cpu(),
        f"{name}._weight_scale_and_zero": both.cpu(),
        f"{name}.codes": codes,
        f"expected.{name}.bfloat16": weight.cpu(),
    }
    cases[name] = {"inner_k_tiles": tiles, "group_size": group_size, "symmetric": symmetric}
write("tinygemm", tensors, cases)
