"""Tiny random models of transformers on disk, and references computed from their weights in full precision."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.23")

LLAMA = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=90)
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(intermediate_size=96, **LLAMA),
    "qwen": lambda: transformers.Qwen2Config(intermediate_size=96, tie_word_embeddings=True, **LLAMA),
    "mixtral": lambda: transformers.MixtralConfig(intermediate_size=96, num_local_experts=4, **LLAMA),
    "qwen_moe": lambda: transformers.Qwen3MoeConfig(
        intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16, **LLAMA
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        intermediate_size=96,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        **LLAMA,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, head_dim=16, **LLAMA
    ),
    "bert": lambda: transformers.BertConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=90
    ),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=90),
}
FUSED = ("gate_up_proj", "down_proj")


def model_class(name: str) -> Any:
    return transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM


def save_dense(folder: Path, name: str, **changes: Any) -> Any:
    """A random model in fp32, saved in ``folder``; weights large enough for logits that differ. The model."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = model_class(name).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5))
    model.save_pretrained(folder)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Of two sequences of six tokens, fp32 on the CPU."""
    tokens = torch.arange(12).view(2, 6) * 7 % 90
    device = next(model.parameters()).device
    with torch.no_grad():
        return model(tokens.to(device)).logits.float().cpu()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal but for the order of sums."""
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def map_weights(
    model: nn.Module, picks: Callable[[str], bool], function: Callable[[torch.Tensor], torch.Tensor]
) -> int:
    """Replace the weights [N, K] of linear layers and experts whose module is picked. Returns how many."""
    from transformers.pytorch_utils import Conv1D

    count = 0
    for name, module in model.named_modules():
        if not picks(name):
            continue
        if type(module) in (nn.Linear, Conv1D):
            w = module.weight.data
            w.copy_(function(w.T).T if isinstance(module, Conv1D) else function(w))
            count += 1
        for fused in FUSED if name.endswith("experts") else ():
            for w in getattr(module, fused).data:
                w.copy_(function(w.T).T if module.is_transposed else function(w))
                count += 1
    return count


def convert_layers(
    folder: Path, picks: Callable[[str], bool], function: Callable[[str, torch.Tensor], dict]
) -> list[str]:
    """Replace ``<p>.weight`` of the saved model by the tensors that ``function(p, weight)`` returns; the names."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    names = [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dim() == 2]
    names = [name for name in names if picks(name)]
    for name in names:
        tensors.update(function(name, tensors.pop(f"{name}.weight")))
    save_file(tensors, file, {"format": "pt"})
    return names


def edit_config(folder: Path, quantization: dict[str, Any] | None = None, **changes: Any) -> None:
    """Change config.json and its ``quantization_config``."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if quantization is not None:
        config["quantization_config"] = config.get("quantization_config", {}) | quantization
    path.write_text(json.dumps(config | changes))
