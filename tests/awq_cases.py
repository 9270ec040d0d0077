"""AWQ layers as gptqmodel and autoawq keep them in memory: stand-ins with their attributes and arithmetic, and
gptqmodel's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_cases import awq_words
from safetensors.torch import save_file
from torch import nn

GROUP = 32
ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


class WQLinear_GEMM(nn.Module):
    """autoawq's."""

    __module__ = "awq.modules.linear.gemm"

    def __init__(self, tensors: dict[str, torch.Tensor], bias: torch.Tensor | None) -> None:
        super().__init__()
        self.w_bit, self.group_size = 4, GROUP
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        if bias is None:
            self.bias = None
        else:
            self.register_buffer("bias", bias)
        self.in_features, self.out_features = self.qweight.shape[0], self.scales.shape[1]

    def dequantize_weight(self) -> torch.Tensor:
        """[K, N] in the scales' dtype."""

        def codes(words: torch.Tensor) -> torch.Tensor:
            out = torch.empty(*words.shape, 8, dtype=torch.int32)
            out[:, :, ORDER] = (words.unsqueeze(-1) >> (4 * torch.arange(8, dtype=torch.int32))) & 15
            return out.view(len(words), -1)

        group = torch.arange(self.in_features) // self.group_size
        return (codes(self.qweight) - codes(self.qzeros)[group]).to(self.scales.dtype) * self.scales[group]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self.dequantize_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class AwqTorchLinear(WQLinear_GEMM):
    """gptqmodel's."""

    __module__ = "gptqmodel.nn_modules.qlinear.torch_awq"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.bits = self.__dict__.pop("w_bit")
        self.adapter = None


def awq_tensors(n: int, k: int, symmetric: bool = False) -> dict[str, torch.Tensor]:
    """Random codes."""
    rng = np.random.default_rng(n * k)
    zeros = rng.integers(0, 16, (k // GROUP, n))
    if symmetric:
        zeros[:] = 8
    return {
        "qweight": awq_words(rng.integers(0, 16, (k, n))),
        "qzeros": awq_words(zeros),
        "scales": torch.from_numpy(rng.uniform(0.005, 0.02, zeros.shape).astype(np.float16)),
    }


def awq_layer(kernel: Any, n: int, k: int, *, symmetric: bool = False, bias: bool = True) -> Any:
    return kernel(awq_tensors(n, k, symmetric), torch.linspace(-1, 1, n).half() if bias else None)


def gptqmodel_awq_layer(n: int, k: int, *, symmetric: bool = False, bias: bool = True) -> Any:
    """The same as gptqmodel's ``AwqTorchLinear``, after loading."""
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
    layer = kernel(bits=4, group_size=GROUP, sym=symmetric, desc_act=False, in_features=k, out_features=n, bias=bias,
                   register_buffers=True)  # fmt: skip
    layer.load_state_dict(awq_layer(AwqTorchLinear, n, k, symmetric=symmetric, bias=bias).state_dict())
    layer.eval().post_init()
    return layer


def write_awq_llama(folder: Path) -> None:
    """An AWQ checkpoint of a tiny Llama."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).half()
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, awq_layer(WQLinear_GEMM, *module.weight.shape, bias=False))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    entries = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm",
                                "zero_point": True},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(entries))
