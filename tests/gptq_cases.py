"""GPTQ layers as gptqmodel and auto_gptq keep them in memory: stand-ins with their attributes and arithmetic, written
from their sources, and gptqmodel's own."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from load_cases import gptq_tensors
from safetensors.torch import save_file
from torch import nn

GROUP = 32


class _QuantLinear(nn.Module):
    """Buffers and forward pass; ``added`` to each stored zero point."""

    added = 0
    reads_order = True
    names = ("in_features", "out_features")

    def __init__(self, tensors: dict[str, torch.Tensor], bits: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.bits = bits
        self.group_size = GROUP
        for name, tensor in tensors.items():
            self.register_buffer(name.removeprefix("p."), tensor)
        if bias is None:
            self.bias = None
        else:
            self.register_buffer("bias", bias)
        setattr(self, self.names[0], len(self.g_idx))
        setattr(self, self.names[1], self.scales.shape[1])

    def dequantize_weight(self) -> torch.Tensor:
        """fp16 [K, N]."""

        def codes(words: torch.Tensor, count: int) -> torch.Tensor:  # int32 [R, W] -> [R, count]
            stream = (words.unsqueeze(-1) >> torch.arange(32)) & 1
            bits = stream.reshape(len(words), -1)[:, : count * self.bits].view(len(words), count, self.bits)
            return (bits << torch.arange(self.bits)).sum(-1)

        (k,), (_, n) = self.g_idx.shape, self.scales.shape
        weight = codes(self.qweight.t(), k).t()
        zeros = codes(self.qzeros, n) + self.added
        order = self.g_idx.long() if self.reads_order else torch.arange(k) // self.group_size
        return self.scales[order] * (weight - zeros[order]).to(self.scales.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, self.dequantize_weight().to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)


class BaseQuantLinear(_QuantLinear):
    """What kernels of gptqmodel have beside that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.adapter = None
        self.planar = self.online_full_had = self.online_partial_had = False
        self._qzeros_format = 1  # also of a checkpoint of version 2, which nothing has converted

    def qzero_format(self) -> int:
        return self._qzeros_format


class TorchLinear(BaseQuantLinear):
    pass


class TritonV2Linear(TorchLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class MarlinLinear(BaseQuantLinear):
    pass


class AWQuantLinear(BaseQuantLinear):
    """Of a kernel of AWQ that rearranges its tensors."""


for kernel in (BaseQuantLinear, TorchLinear, TritonV2Linear, MarlinLinear, AWQuantLinear):
    kernel.__module__ = "gptqmodel.nn_modules.qlinear"


class QuantLinear(_QuantLinear):
    """auto_gptq's, of ``qlinear_cuda.py``: zero points are stored less one."""

    __module__ = "auto_gptq.nn_modules.qlinear.qlinear_cuda"
    QUANT_TYPE = "cuda"
    added = 1
    names = ("infeatures", "outfeatures")


def gptq_layer(
    kernel: Any, n: int, k: int, *, bits: int = 4, symmetric: bool = False, act_order: bool = False, bias: bool = True
) -> Any:
    """A layer of a stand-in's class, of random codes."""
    rng = np.random.default_rng(n * k + bits)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = rng.integers(1, 1 << bits, (n, k // GROUP))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = rng.uniform(0.005, 0.02, zeros.shape).astype(np.float16)
    order = np.arange(k) // GROUP
    if act_order:
        order = rng.permutation(order)
    tensors = gptq_tensors(codes, zeros, scales, order, bits, kernel.added)
    return kernel(tensors, bits, torch.linspace(-1, 1, n).half() if bias else None)


def gptqmodel_layer(
    n: int, k: int, *, bits: int = 4, symmetric: bool = False, act_order: bool = False, bias: bool = True
) -> Any:
    """The same as gptqmodel's ``TorchLinear``, after loading."""
    kernel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    arguments = {"bits": bits, "symmetric": symmetric, "act_order": act_order, "bias": bias}
    source = gptq_layer(TorchLinear, n, k, **arguments)
    layer = kernel(bits=bits, group_size=GROUP, sym=symmetric, desc_act=act_order, in_features=k, out_features=n,
                   bias=bias)  # fmt: skip
    layer.load_state_dict(source.state_dict())
    layer.eval().post_init()
    # Compiling it takes seconds, and computes the same.
    layer.__dict__.pop("dequantize_weight")
    return layer


def write_gptq_llama(folder: Path, version: str, act_order: bool = False) -> None:
    """A GPTQ checkpoint of a tiny Llama."""
    import transformers

    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=96,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).half()
    kernel = functools.partial(gptq_layer, QuantLinear if version == "gptq" else TorchLinear)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = kernel(*module.weight.shape, act_order=act_order, bias=False)
            model.model.set_submodule(name, layer)
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    entries = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": act_order,
                                "sym": False, "checkpoint_format": version},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(entries))
