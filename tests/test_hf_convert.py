"""What ``pyquant convert`` writes, loaded by transformers: the logits of the model dequantized from the original."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes_cases import dense, stored_form
from click.testing import CliRunner
from hf_cases import assert_close, convert_layers, edit_config, logits, model_class, save_dense, transformers
from load_cases import gptq_tensors
from safetensors.torch import load_file, save_file
from torch import nn

import pyquant.hf
from pyquant import checkpoint, quantize
from pyquant.cli import main
from pyquant.nn import QuantLinear

Tensors = dict[str, torch.Tensor]


class Source:
    """A producer's checkpoint of a tiny model, and beside it the same weights dequantized."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], layer: Any) -> None:
        self.name, self.original, self.converted = name, folder / "original", folder / "converted"
        save_dense(self.original, name)
        shutil.copytree(self.original, folder / "dense")
        weights: Tensors = {}

        def replace(module: str, w: torch.Tensor) -> Tensors:
            tensors, weights[module] = layer(module, w)
            return tensors

        self.layers = convert_layers(self.original, quantized_by_default, replace)
        edit_config(self.original, config)
        convert_layers(folder / "dense", quantized_by_default, lambda n, _: {f"{n}.weight": weights[n]})
        self.expected = logits(model_class(name).from_pretrained(folder / "dense"))

    def convert(self) -> Path:
        result = CliRunner().invoke(main, ["convert", str(self.original), str(self.converted)])
        assert result.exit_code == 0, result.output
        return self.converted


def quantized_by_default(name: str) -> bool:
    return "embed" not in name and "norm" not in name and not name.endswith(("lm_head", "gate"))


def bitsandbytes_layer(nested: bool) -> Any:
    def layer(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        stored, state = stored_form(quantize(w, "nf4", 64, nested=nested))
        tensors = {f"{name}.weight.{key}": t for key, t in state.as_dict().items()}
        return {f"{name}.weight": stored, **tensors}, dense(stored, state)

    return layer


def gptq_layer(act_order: bool) -> Any:
    """The formula of GPTQ's documents: ``(code - zero) * scale[g_idx]``."""

    def layer(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        n, k = w.shape
        rng = np.random.default_rng(n * k + len(name))
        codes, zeros = rng.integers(0, 16, (n, k)), rng.integers(1, 16, (n, k // 32))
        scales = (rng.random((n, k // 32)) * 0.02 * k**-0.5 * 8 + 0.01).astype(np.float16)
        g_idx = np.arange(k) // 32
        if act_order:
            rng.shuffle(g_idx)
        tensors = gptq_tensors(codes, zeros, scales, g_idx, 4, stored_offset=1)
        expected = (codes - zeros[:, g_idx]) * scales[:, g_idx].astype(np.float32)
        return {name + key.removeprefix("p"): t for key, t in tensors.items()}, torch.from_numpy(expected).float()

    return layer


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}


@pytest.mark.parametrize("name", ["llama", "qwen", "mixtral", "qwen_moe"])
@pytest.mark.parametrize(
    ("config", "layer"),
    [
        pytest.param(BNB, bitsandbytes_layer(nested=False), id="bitsandbytes"),
        pytest.param(BNB, bitsandbytes_layer(nested=True), id="bitsandbytes-nested"),
        pytest.param(GPTQ, gptq_layer(act_order=False), id="gptq"),
        pytest.param(GPTQ, gptq_layer(act_order=True), id="gptq-act-order"),
    ],
)
def test_converted(tmp_path: Path, name: str, config: dict[str, Any], layer: Any) -> None:
    source = Source(tmp_path, name, config, layer)
    model = model_class(name).from_pretrained(source.convert())
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(source.layers) >= 14
    assert_close(logits(model), source.expected)

    about = model.config.quantization_config
    assert about.converted_from == config["quant_method"]
    model.save_pretrained(tmp_path / "saved")
    again = model_class(name).from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.to_dict() == about.to_dict()
    model.dequantize()
    assert_close(logits(model), source.expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_converted_on_the_gpu(tmp_path: Path, name: str) -> None:
    pytest.importorskip("accelerate")
    source = Source(tmp_path, name, BNB, bitsandbytes_layer(nested=True))
    model = model_class(name).from_pretrained(source.convert(), device_map="cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    torch.testing.assert_close(logits(model), source.expected, rtol=1e-3, atol=1e-3)


def test_shards(tmp_path: Path) -> None:
    """Layers whose tensors are spread over files."""
    source = Source(tmp_path, "mixtral", BNB, bitsandbytes_layer(nested=True))
    tensors = load_file(source.original / "model.safetensors")
    (source.original / "model.safetensors").unlink()
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        save_file(part, source.original / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source.original / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model = model_class("mixtral").from_pretrained(source.convert())
    assert_close(logits(model), source.expected)


def test_gpt_oss(tmp_path: Path) -> None:
    """Fused MXFP4 experts with biases; the reference is transformers' own dequantization."""
    original = tmp_path / "original"
    save_dense(original, "gpt_oss")
    tensors = load_file(original / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, k, n = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, n, k // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 124, (experts, n, k // 32), dtype=torch.uint8)
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    edit_config(original, {"quant_method": "mxfp4"})
    dequantize = transformers.Mxfp4Config(dequantize=True)
    expected = logits(model_class("gpt_oss").from_pretrained(original, quantization_config=dequantize, dtype="float32"))

    result = CliRunner().invoke(main, ["convert", str(original), str(tmp_path / "converted")])
    assert result.exit_code == 0, result.output
    model = model_class("gpt_oss").from_pretrained(tmp_path / "converted")
    experts = model.model.layers[0].mlp.experts
    assert [m.weight.format.name for m in experts.gate_up_proj] == ["mxfp4"] * 4
    assert isinstance(experts.gate_up_proj_bias, nn.Parameter)
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    again = model_class("gpt_oss").from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
def test_the_quantize_command(tmp_path: Path, name: str) -> None:
    """`pyquant quantize` of a folder writes what transformers loads, too."""
    save_dense(tmp_path / "dense", name)
    command = [
        "quantize",
        str(tmp_path / "dense"),
        str(tmp_path / "quantized"),
        "--format",
        "int4",
        "--group-size",
        "32",
    ]
    if name == "mixtral":  # with the router, which is no linear layer
        more = ["--include", "*.gate.weight", "--include", "*.experts.*"]
        assert CliRunner().invoke(main, command + more).exit_code == 0
        with pytest.raises(
            ValueError, match=r"mlp\.gate\.weight of the model is no weight .* quantize the model without"
        ):
            model_class(name).from_pretrained(tmp_path / "quantized")
        command.append("--overwrite")
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    model = model_class(name).from_pretrained(tmp_path / "quantized")
    config = pyquant.hf.PyquantConfig("int4", group_size=32)
    expected = model_class(name).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert_close(logits(model), logits(expected))
    again = CliRunner().invoke(main, ["quantize", str(tmp_path / "quantized"), str(tmp_path / "x")])
    assert (again.exit_code, "is quantized already" in again.output) == (1, True)


def test_quantize_refuses_the_checkpoints_of_others(tmp_path: Path) -> None:
    source = Source(tmp_path, "llama", GPTQ, gptq_layer(act_order=False))
    result = CliRunner().invoke(main, ["quantize", str(source.original), str(tmp_path / "x")])
    assert result.exit_code == 1
    assert "is quantized already, by gptq; `pyquant convert` reads such checkpoints" in result.output


def test_experts_of_several_formats(tmp_path: Path) -> None:
    """A converter may choose the format of each layer by its tensors."""
    converted = Source(tmp_path, "mixtral", BNB, bitsandbytes_layer(nested=True)).convert()
    content = checkpoint.load(converted / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
    content[name] = other = quantize(content[name].dequantize(), "uint4", 32)
    checkpoint.save(converted / "model.safetensors", content, {"format": "pt"})
    config = json.loads((converted / "config.json").read_text())
    config["quantization_config"]["modules"][name.removesuffix(".weight")] = checkpoint.settings(other)
    (converted / "config.json").write_text(json.dumps(config))
    model = model_class("mixtral").from_pretrained(converted)
    formats = [m.weight.format.name for m in model.model.layers[0].mlp.experts.down_proj]
    assert formats == ["nf4", "nf4", "uint4", "nf4"]
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj[2].weight.unpack().codes, other.codes)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_against_bitsandbytes(tmp_path: Path, name: str) -> None:
    """Quantized and saved by transformers with bitsandbytes itself."""
    pytest.importorskip("accelerate")
    # K of a multiple of the block size: bitsandbytes dequantizes others differently on the CPU (docs/loading.md).
    save_dense(tmp_path / "dense", name, intermediate_size=128)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = model_class(name).from_pretrained(tmp_path / "dense", quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "original")
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "original"), str(tmp_path / "converted")])
    assert result.exit_code == 0, result.output
    ours = model_class(name).from_pretrained(tmp_path / "converted")
    theirs.dequantize(dtype=torch.float32)
    assert_close(logits(ours), logits(theirs))
