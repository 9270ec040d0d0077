"""Golden file of AWQ: ``pip install --no-deps autoawq``, then ``python make_awq.py`` (CPU).

Only the packing is taken from autoawq, without its ``__init__``, which imports what it takes to quantize a model.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import torch
from golden import write
from torch import nn

spec = importlib.util.find_spec("awq")
assert spec is not None
for package in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
    module = ModuleType(package)
    assert spec.submodule_search_locations is not None
    module.__path__ = [spec.submodule_search_locations[0] + "/" + "/".join(package.split(".")[1:])]
    sys.modules[package] = module
module = ModuleType("awq.utils.module")  # looks for compiled extensions
module.try_import = lambda name: (None, "")  # type: ignore[attr-defined]
sys.modules["awq.utils.module"] = module
from awq.modules.linear.gemm import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402

# name: (group size, zeros from, N, K)
CASES = {"asym": (32, (0, 16), 32, 64), "sym": (32, (8, 9), 32, 64), "channel": (64, (0, 16), 32, 64)}

torch.manual_seed(0)
tensors, cases = {}, {}
for name, (group_size, (low, high), n, k) in CASES.items():
    groups = k // group_size
    scales = (torch.rand(groups, n) * 0.02 + 0.01).half()
    zeros = torch.randint(low, high, (groups, n))
    codes = torch.randint(0, 16, (n, k))
    linear = nn.Linear(k, n)
    index = torch.arange(k) // group_size
    linear.weight.data = (codes - zeros.t()[:, index]) * scales.t()[:, index].float()
    packed = WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scales.float(), zeros=zeros)
    for part in ("qweight", "qzeros", "scales", "bias"):
        tensors[f"{name}.{part}"] = getattr(packed, part)
    weight = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, group_size)
    assert weight.dtype == torch.float16
    tensors[f"expected.{name}.float16"] = weight.t()
    cases[name] = {"group_size": group_size, "symmetric": name == "sym"}
write("awq", tensors, cases, "autoawq")
