"""``pyquant.hf``: transformers quantizes while it loads, saves, loads again, dequantizes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import (
    CONFIGS,
    LLAMA,
    assert_close,
    logits,
    map_weights,
    model_class,
    save_dense,
    transformers,
)
from safetensors.torch import load_file, save_file
from torch import nn

from pyquant import quantize
from pyquant.formats import FORMATS
from pyquant.hf import PyquantConfig
from pyquant.nn import QuantLinear

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LINEARS = {
    "llama": 14,
    "qwen": 14,
    "mixtral": 8 + 16,
    "qwen_moe": 8 + 16,
    "qwen2_moe": 8 + 16 + 6,
    "gpt_oss": 8 + 16,
    "bert": 13,
    "gpt2": 8,
}
# What a model does not quantize unless told otherwise.
KEPT = ("shared_expert_gate", "lm_head", "decoder")


def placed(device: str) -> dict[str, Any]:
    """Arguments of from_pretrained; a device map needs accelerate, the CPU does not."""
    if device == "cpu":
        return {}
    pytest.importorskip("accelerate")
    return {"device_map": device}


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def load(folder: Path, name: str, config: PyquantConfig | None = None, device: str = "cpu", **arguments: Any) -> Any:
    if config is not None:  # AutoModel takes an explicit None for the checkpoint's
        arguments["quantization_config"] = config
    return model_class(name).from_pretrained(folder, **placed(device), **arguments)


def dequantized_reference(model: nn.Module, **arguments: Any) -> int:
    """The model with weights that were quantized and dequantized, one matrix at a time."""
    return map_weights(model, lambda n: not n.endswith(KEPT), lambda w: quantize(w, **arguments).dequantize())


# ---- quantizing while loading, saving, loading


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(tmp_path: Path, name: str, device: str) -> None:
    dense = save_dense(tmp_path / "dense", name)
    model = load(tmp_path / "dense", name, PyquantConfig("nf4", nested=True), device)
    assert len(layers(model)) == LINEARS[name]
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {device}
    assert dequantized_reference(dense, format="nf4", nested=True) == LINEARS[name]
    out = logits(model)
    assert_close(out, logits(dense), 1e-4 if device == "cpu" else 1e-3)

    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", name, device=device)
    assert torch.equal(logits(again), out)
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in saved.items())
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()
    again.save_pretrained(tmp_path / "twice")
    first, second = (load_file(tmp_path / f / "model.safetensors") for f in ("quantized", "twice"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", [f for f in FORMATS if f != "codebook4"])
def test_every_format(tmp_path: Path, name: str) -> None:
    dense = save_dense(tmp_path / "dense", "llama")
    model = load(tmp_path / "dense", "llama", PyquantConfig(name))
    dequantized_reference(dense, format=name)
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized", "llama")), logits(model))


def test_a_codebook_and_other_arguments(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "mixtral")
    values = torch.linspace(-1, 1, 16)
    own = dict(format="codebook4", group_size=32, scale_type="fp16", codebook=values)
    model = load(tmp_path / "dense", "mixtral", PyquantConfig(**own))
    dequantized_reference(dense, **own)
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", "mixtral")
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.codebook == values.tolist()


def test_hqq_and_the_dtype_of_the_model(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "llama").bfloat16()
    arguments = dict(format="uint4", group_size=32, method="hqq")
    model = load(tmp_path / "dense", "llama", PyquantConfig(**arguments), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.up_proj
    expected = quantize(dense.model.layers[0].mlp.up_proj.weight.detach(), **arguments)
    assert torch.equal(layer.weight.unpack().codes, expected.codes)
    assert layer.weight.scales.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


def test_loading_in_another_dtype(tmp_path: Path) -> None:
    """Biases and norms are cast, scales are part of the stored weight."""
    save_dense(tmp_path / "dense", "qwen")
    model = load(tmp_path / "dense", "qwen", PyquantConfig("int4"))
    model.save_pretrained(tmp_path / "quantized")
    half = load(tmp_path / "quantized", "qwen", dtype=torch.bfloat16)
    layer = half.model.layers[0].self_attn.q_proj
    assert (layer.bias.dtype, layer.weight.scales.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(layer.weight.codes, model.model.layers[0].self_attn.q_proj.weight.codes)
    torch.testing.assert_close(logits(half), logits(model), rtol=0.1, atol=0.1)


def test_sharded_saving(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "mixtral")
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("int4"))
    model.save_pretrained(tmp_path / "quantized", max_shard_size="40KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "quantized", "mixtral")), logits(model))


def test_config_json(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "llama")
    load(tmp_path / "dense", "llama", PyquantConfig("int4", group_size=32)).save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    modules = config.pop("modules")
    assert config == {
        "quant_method": "pyquant", "version": 1, "format": "int4", "group_size": 32, "nested": False, "method": "rtn",
    }  # fmt: skip
    assert modules["model.layers.1.mlp.up_proj"] == {
        "format": "int4", "bits": 4, "group_size": 32, "scale_type": "fp32", "zero_type": "none", "shape": [96, 64],
    }  # fmt: skip
    stored = load_file(tmp_path / "quantized" / "model.safetensors")
    assert {n.removesuffix(".weight.quant_spec") for n in stored if n.endswith("quant_spec")} == modules.keys()


def test_one_config_for_two_models(tmp_path: Path) -> None:
    save_dense(tmp_path / "a", "llama")
    save_dense(tmp_path / "b", "bert")
    config = PyquantConfig("nf4")
    first = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", quantization_config=config)
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "b", quantization_config=config)
    assert config.modules is None
    assert first.config.quantization_config.modules.keys() == layers(first).keys()


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """The names in the files have a prefix that the model has not, or the reverse."""
    save_dense(tmp_path / "dense", "llama")
    model = load(tmp_path / "dense", "llama", PyquantConfig("nf4"))
    model.save_pretrained(tmp_path / "quantized")
    body = transformers.AutoModel.from_pretrained(tmp_path / "quantized")
    assert len(layers(body)) == 14
    tokens = torch.arange(6)[None]
    expected = model.model(tokens).last_hidden_state
    assert torch.equal(body(tokens).last_hidden_state, expected)
    body.save_pretrained(tmp_path / "body")
    assert torch.equal(load(tmp_path / "body", "llama").model(tokens).last_hidden_state, expected)


# ---- what is quantized


@pytest.mark.parametrize("stored", [False, True])
def test_tied_weights_stay(tmp_path: Path, stored: bool) -> None:
    """Even if the skip list does not name them, and some checkpoint has both."""
    save_dense(tmp_path / "dense", "qwen")
    if stored:
        file = tmp_path / "dense" / "model.safetensors"
        tensors = load_file(file)
        save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    model = load(tmp_path / "dense", "qwen", PyquantConfig("nf4", modules_to_not_convert=["embed_tokens"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    assert sorted({name.split(".")[2] for name in layers(model)}) == ["0", "1"]
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", "qwen")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        (["lm_head", "down_proj"], {"layers.0.mlp.down_proj", "layers.1.mlp.down_proj"}),
        (["lm_head", "model.layers.1"], {f"layers.1.{m}" for m in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}),
        (["lm_head", r"model\.layers\.\d+\.mlp.*_proj"], {f"layers.{i}.mlp.{m}_proj" for i in (0, 1)
                                                       for m in ("gate", "up", "down")}),
    ],
)  # fmt: skip
def test_skip_lists(tmp_path: Path, skip: list[str], kept: set[str]) -> None:
    dense = save_dense(tmp_path / "dense", "llama")
    model = load(tmp_path / "dense", "llama", PyquantConfig("nf4", modules_to_not_convert=skip))
    plain = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == {"lm_head"} | {f"model.{name}" for name in kept}
    map_weights(dense, lambda n: n not in plain, lambda w: quantize(w, "nf4").dequantize())
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized", "llama")), logits(model))


def test_an_own_skip_list_quantizes_the_head(tmp_path: Path) -> None:
    """As with the other configurations of transformers."""
    save_dense(tmp_path / "dense", "llama")
    model = load(tmp_path / "dense", "llama", PyquantConfig("nf4", modules_to_not_convert=["q_proj"]))
    assert isinstance(model.lm_head, QuantLinear)


def test_routers_that_are_linear_layers(tmp_path: Path) -> None:
    """The one for Qwen2's shared expert, while most are classes of their own; an own skip list has the last word."""
    dense = save_dense(tmp_path / "dense", "qwen2_moe")
    model = load(tmp_path / "dense", "qwen2_moe", PyquantConfig("nf4"))
    assert type(model.model.layers[0].mlp.shared_expert_gate) is nn.Linear
    dequantized_reference(dense, format="nf4")
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized", "qwen2_moe")), logits(model))
    model = load(tmp_path / "dense", "qwen2_moe", PyquantConfig("nf4", modules_to_not_convert=["lm_head"]))
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, QuantLinear)


def test_experts_of_one_layer_skipped(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "mixtral")
    skip = ["lm_head", "model.layers.0.mlp.experts"]
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4", modules_to_not_convert=skip))
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    map_weights(dense, lambda n: n not in skip, lambda w: quantize(w, "nf4").dequantize())
    assert_close(logits(model), logits(dense))
    model.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(load(tmp_path / "quantized", "mixtral")), logits(model))


def test_experts_keep_their_class(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "mixtral")
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4"))
    experts = model.model.layers[0].mlp.experts
    assert type(experts).__name__ == "MixtralExperts"
    assert [m.weight.shape for m in experts.gate_up_proj] == [torch.Size([192, 64])] * 4
    twin = copy.deepcopy(model)
    expected = logits(model)
    for layer in layers(model).values():
        layer.register_buffer("_codes", torch.zeros_like(layer._codes), persistent=False)
    assert torch.equal(logits(twin), expected), "the copy runs on the original's weights"


def test_a_new_head_is_not_quantized(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "bert")
    with pytest.warns(UserWarning, match="newly initialized, and so not quantized: classifier.weight"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "dense", quantization_config=PyquantConfig("nf4", modules_to_not_convert=[r".*\.pooler"])
        )
    assert type(model.classifier) is nn.Linear
    assert torch.isfinite(model.classifier.weight).all()
    assert not model.classifier.weight.is_meta
    assert len(layers(model)) == 12


def test_a_missing_bias_is_zero(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "qwen")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.bias"]
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    model = load(tmp_path / "dense", "qwen", PyquantConfig("nf4"))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, torch.zeros(64))
    assert torch.equal(model.model.layers[0].self_attn.k_proj.bias, dense.model.layers[0].self_attn.k_proj.bias)


def test_experts_that_are_not_fused_as_expected(tmp_path: Path) -> None:
    text = transformers.Llama4TextConfig(intermediate_size=96, intermediate_size_mlp=96, num_local_experts=2,
                                         head_dim=16, **LLAMA)  # fmt: skip
    transformers.Llama4ForCausalLM(text).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="fused expert tensors, such as .* are not quantized") as warned:
        model = transformers.Llama4ForCausalLM.from_pretrained(tmp_path, quantization_config=PyquantConfig("nf4"))
    assert layers(model)
    assert not any("Llama4Router" in str(warning.message) for warning in warned), "nobody wants routers quantized"


def test_linear_layers_of_a_models_own(tmp_path: Path) -> None:
    config = transformers.FalconConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=90)
    transformers.FalconForCausalLM(config).save_pretrained(tmp_path)
    quantization = PyquantConfig("nf4")
    with (
        pytest.warns(UserWarning, match="layers of FalconLinear are not quantized"),
        pytest.raises(ValueError, match="FalconForCausalLM has no weight to quantize"),
    ):
        transformers.FalconForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)


# ---- the loaded model


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "gpt2"])
def test_dequantize(tmp_path: Path, name: str) -> None:
    save_dense(tmp_path / "dense", name)
    model = load(tmp_path / "dense", name, PyquantConfig("nf4"))
    expected = logits(model)
    model.dequantize()
    assert not layers(model)
    assert_close(logits(model), expected)
    model.save_pretrained(tmp_path / "plain")
    plain = load(tmp_path / "plain", name)
    assert not getattr(plain, "is_quantized", False)
    assert torch.equal(logits(plain), logits(model))


def test_gradients_reach_inputs_and_biases(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "mixtral")
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4"))
    assert model.hf_quantizer.is_trainable
    model(torch.arange(6)[None]).logits.sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_memory_and_what_compiles(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", "llama", intermediate_size=512)
    model = load(tmp_path / "dense", "llama", PyquantConfig("nf4", modules_to_not_convert=["embed_tokens"]))
    assert model.get_memory_footprint() < dense.get_memory_footprint() / 3
    assert model.hf_quantizer.is_compileable
    x = torch.arange(6)[None]
    layer = model.model.layers[0].mlp
    hidden = torch.randn(2, 64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(hidden), layer(hidden))
    assert model.generate(x, max_new_tokens=3, do_sample=False).shape == (1, 9)


def test_device_maps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    save_dense(tmp_path / "dense", "mixtral")
    expected = logits(load(tmp_path / "dense", "mixtral", PyquantConfig("nf4")))
    for device_map in ("cpu", {"": "cpu"}, {"model.embed_tokens": "cpu", "model": "cpu", "lm_head": "cpu"}):
        model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4"), device_map=device_map)
        assert torch.equal(logits(model), expected)
        model.save_pretrained(tmp_path / "quantized")
        again = load(tmp_path / "quantized", "mixtral", device_map=device_map)
        assert torch.equal(logits(again), expected)


def test_sizes_for_automatic_device_maps(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers.integrations.accelerate import compute_module_sizes

    save_dense(tmp_path / "dense", "mixtral")
    with torch.device("meta"):
        meta = model_class("mixtral").from_config(CONFIGS["mixtral"]())
    quantizer = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4")).hf_quantizer
    sizes, _ = compute_module_sizes(meta, quantizer)
    experts = 4 * (192 * 64 + 64 * 96)
    assert sizes["model.layers.0.mlp.experts"] == experts * (0.5 + 4 / 64)
    assert sizes["lm_head"] == 90 * 64 * 4


@pytest.mark.gpu
def test_automatic_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    save_dense(tmp_path / "dense", "mixtral")
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4"), device_map="auto")
    model.save_pretrained(tmp_path / "quantized")
    again = load(tmp_path / "quantized", "mixtral", device_map="auto")
    assert {t.device.type for t in again.buffers()} == {"cuda"}
    assert torch.equal(logits(again), logits(model))


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    save_dense(tmp_path / "dense", "llama")
    expected = logits(load(tmp_path / "dense", "llama", PyquantConfig("nf4"), "cuda"))
    device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1,
                  "model.rotary_emb": 0, "lm_head": 1}  # fmt: skip
    model = load(tmp_path / "dense", "llama", PyquantConfig("nf4"), device_map=device_map)
    assert model.model.layers[1].mlp.up_proj.weight.device.index == 1
    assert torch.equal(logits(model), expected)


@pytest.mark.gpu
def test_moves_to_the_gpu(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "mixtral")
    model = load(tmp_path / "dense", "mixtral", PyquantConfig("nf4", nested=True))
    expected = logits(model)
    torch.testing.assert_close(logits(model.to("cuda")), expected, rtol=1e-3, atol=1e-3)
