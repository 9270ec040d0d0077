"""Golden file of ModelOpt NVFP4: ``pip install --no-deps nvidia-modelopt omegaconf pulp scipy``, then run it.

A tiny Llama is quantized and exported as a checkpoint; expected weights are what ModelOpt's own tensor class makes of
the exported tensors. W4A4 and W4A16 are the recipes that a CPU can quantize; they differ in the scales of activations.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

import modelopt.torch.quantization as mtq
import torch
from golden import write
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
# name: (recipe, dtype of the model, a bias in the attention's layers)
RECIPES = {
    "w4a4": (mtq.NVFP4_DEFAULT_CFG, torch.bfloat16, False),
    "w4a16": (mtq.W4A16_NVFP4_CFG, torch.float16, True),
}
CONFIG = dict(
    architectures=["LlamaForCausalLM"], hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, vocab_size=32,
)  # fmt: skip
tensors, cases = {}, {}
for name, (recipe, dtype, bias) in RECIPES.items():
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attention_bias=bias)).to(dtype)
    # Set here, since the order in which transformers draws them is its own.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.model.layers[0].mlp.up_proj.weight.data[:2, :16] = 0  # blocks without a largest value
    mtq.quantize(model, recipe, lambda m: m(torch.arange(16)[None]))
    with TemporaryDirectory() as folder:
        export_hf_checkpoint(model, export_dir=folder)
        state = load_file(f"{folder}/model.safetensors")
    for layer in LAYERS:
        prefix, case = f"model.layers.0.{layer}.", f"{name}.{layer}"
        parts = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        tensors |= {f"{case}.{part}": t for part, t in parts.items()}
        codes, scale, double = (parts[part] for part in ("weight", "weight_scale", "weight_scale_2"))
        stored = NVFP4QTensor(torch.Size((codes.shape[0], 2 * codes.shape[1])), dtype, codes)
        for to in (torch.float32, torch.float16, torch.bfloat16):
            expected = stored.dequantize(to, scale=scale, double_scale=double, block_sizes={-1: 16})
            tensors[f"expected.{case}.{str(to).removeprefix('torch.')}"] = expected
        cases[case] = {"recipe": name}
write("modelopt", tensors, cases, "nvidia-modelopt", "transformers")
