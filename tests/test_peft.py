"""PEFT's LoRA on QuantLinear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VARIANTS, random_weight
from lora_cases import dense_twin, trainable_gradients
from torch import nn

import pyquant
from pyquant import quantize_model
from pyquant.nn import QuantLinear

peft = pytest.importorskip("peft", reason="needs peft")
lora = pytest.importorskip("pyquant.peft")


def make_base(format: str = "nf4", bias: bool = True, **arguments: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(128, 192, bias=bias), nn.GELU(), nn.Linear(192, 128, bias=bias))
    return quantize_model(model, format, **arguments)


def config(**arguments: Any) -> Any:
    return lora.register(peft.LoraConfig(**{"r": 4, "target_modules": ["0", "2"], **arguments}))


def with_adapter(base: nn.Module, **arguments: Any) -> Any:
    """An adapter with an effect: PEFT begins with B = 0."""
    model = peft.get_peft_model(base, config(**arguments))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("format", ["nf4", "uint4", "kbit3", "mxfp4"])
def test_gradients_are_those_of_the_dequantized_model(format: str) -> None:
    """The dense twin has PEFT's own layers around nn.Linear, with the same adapters."""
    base = make_base(format)
    dense = peft.get_peft_model(dense_twin(base), peft.LoraConfig(r=4, target_modules=["0", "2"]))
    model = with_adapter(base)
    dense.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
    x, upstream = torch.randn(6, 128), torch.randn(6, 128)
    model(x).backward(upstream)
    dense(x).backward(upstream)
    got, expected = trainable_gradients(model), trainable_gradients(dense)
    assert got.keys() == expected.keys()
    assert len(got) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4)


def test_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    base = make_base()
    model, x = with_adapter(copy.deepcopy(base)), torch.randn(3, 128)
    model.save_pretrained(tmp_path)
    loaded = lora.register(peft.LoraConfig.from_pretrained(tmp_path))
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=loaded)
    assert torch.equal(other(x), model(x))
    with other.disable_adapter():
        assert torch.equal(other(x), base(x))


def test_merge_and_unmerge() -> None:
    """Merged: the sum, rounded to the format again. Unmerged: the bits of before."""
    base = make_base("int8")
    model, x = with_adapter(copy.deepcopy(base), lora_bias=True), torch.randn(3, 128)
    nn.init.ones_(model.base_model.model[0].lora_B["default"].bias)
    y = model(x)
    with pytest.warns(UserWarning, match="merge rounds the sum to int8 again"):
        model.merge_adapter()
    assert not torch.equal(model.base_model.model[0].base_layer.bias, base[0].bias)
    assert (model(x) - y).norm() < 0.02 * y.norm()
    model.unmerge_adapter()
    for name, tensor in base.state_dict().items():
        layer, _, part = name.partition(".")
        assert torch.equal(model.base_model.model[int(layer)].base_layer.state_dict()[part], tensor), name
    assert torch.equal(model(x), y)
    with pytest.warns(UserWarning, match="merge rounds"):
        merged = model.merge_and_unload()
    assert isinstance(merged[0], QuantLinear)
    assert (merged(x) - y).norm() < 0.02 * y.norm()


def test_merge_with_act_order() -> None:
    weight = random_weight(next(v for v in VARIANTS if v.format.name == "int8"), 96, 128, 128)
    layer = QuantLinear.from_quantized(weight, torch.randn(96), torch.randperm(128))
    model, x = with_adapter(nn.Sequential(layer), target_modules=["0"]), torch.randn(3, 128)
    y = model(x)
    with pytest.warns(UserWarning, match="merge rounds"):
        model.merge_adapter()
    assert (model(x) - y).norm() < 0.02 * y.norm()


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    model, x = with_adapter(make_base()), torch.randn(3, 128)
    layer = model.base_model.model[0]
    expected = layer.base_layer(x)
    layer.lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="merge"), pytest.raises(ValueError, match="expected finite values"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_layer(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights: expected one of True, .*got 'pissa'"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out: expected False"),
        ({"target_modules": "all-linear"}, r"register: target_modules: 'all-linear' needs the model"),
    ],
    ids=["dora", "pissa", "fan_in_fan_out", "all-linear"],
)
def test_what_needs_the_dense_weight_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(make_base(), config(**arguments))


PROJECTIONS = {
    f"{block}.{p}_proj" for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))) for p in names
}


def all_linear(model: nn.Module, **arguments: Any) -> Any:
    return lora.register(peft.LoraConfig(r=4, target_modules="all-linear", **arguments), model)


def tiny_llama() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    settings = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=97,
                                        num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return transformers.LlamaForCausalLM(settings)


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers that have LoRA."""
    prefix = "base_model.model."
    return {n.removeprefix(prefix) for n, m in model.named_modules() if hasattr(m, "lora_A")}


LLAMA_LAYERS = {f"model.layers.{i}.{name}" for i in range(2) for name in PROJECTIONS}


@pytest.mark.parametrize("exclude", [["lm_head"], []], ids=["head dense", "head quantized"])
def test_all_linear_finds_quantized_layers_and_no_head(exclude: list[str], tmp_path: Path) -> None:
    model = quantize_model(tiny_llama(), "nf4", exclude=[*exclude, "*.1.mlp.up_proj"])
    base = copy.deepcopy(model)
    found = peft.get_peft_model(model, all_linear(model, task_type="CAUSAL_LM"))
    assert adapted(found) == LLAMA_LAYERS
    kinds = {n: type(m) for n, m in found.base_model.model.named_modules() if n in LLAMA_LAYERS}
    assert kinds.pop("model.layers.1.mlp.up_proj") is not lora.LoraQuantLinear
    assert set(kinds.values()) == {lora.LoraQuantLinear}

    found.save_pretrained(tmp_path)  # with the names, so that loading needs no model
    loaded = lora.register(peft.LoraConfig.from_pretrained(tmp_path))
    assert adapted(peft.PeftModel.from_pretrained(base, tmp_path, config=loaded)) == LLAMA_LAYERS


def test_all_linear_on_a_model_that_has_adapters() -> None:
    """The layers themselves, nothing inside of them."""
    model = make_base()
    first = peft.get_peft_model(model, all_linear(model))
    config = all_linear(first.base_model.model)
    assert config.target_modules == ["0", "2"]
    first.add_adapter("second", config)
    assert adapted(first) == {"0", "2"}


def test_all_linear_of_a_classifier() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    settings = transformers.BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
                                       vocab_size=90)  # fmt: skip
    model = quantize_model(transformers.BertForSequenceClassification(settings), "nf4", exclude=["classifier"])
    assert "classifier" in all_linear(model).target_modules
    assert not [n for n in all_linear(model, task_type="SEQ_CLS").target_modules if "classifier" in n]
    assert len(all_linear(model, task_type="SEQ_CLS").target_modules) == 7


def test_all_linear_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="register: model: expected linear layers beside the output head"):
        all_linear(nn.Embedding(4, 4))


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_all_linear_on_a_model_quantized_by_transformers(tmp_path: Path, name: str) -> None:
    """Also the experts' layers; a step trains, and the base stays frozen."""
    pytest.importorskip("transformers", minversion="5.23")
    from hf_cases import model_class, save_dense

    from pyquant.hf import PyquantConfig

    save_dense(tmp_path, name)
    model = model_class(name).from_pretrained(tmp_path, quantization_config=PyquantConfig("nf4"))
    quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    found = peft.get_peft_model(model, all_linear(model, task_type="CAUSAL_LM"))
    assert adapted(found) == quantized
    assert any("experts.gate_up_proj.0" in n for n in quantized) is (name == "mixtral")
    tokens = torch.arange(12).view(2, 6) * 7 % 90
    optimizer = torch.optim.AdamW([p for p in found.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = found(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("freed", [False, True])
def test_all_linear_on_an_accelerated_model(freed: bool) -> None:
    """bitsandbytes' layers are nn.Linear, and PEFT's own rule finds them; register finds the same and no head."""
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    for name in LLAMA_LAYERS:
        old = model.get_submodule(name)
        layer = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, quant_type="nf4").to("cpu")
        layer.support_avx512bf16_for_cpu = False
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True
    done = pyquant.accelerate(model, free_original=freed)
    assert set(done.replaced) == LLAMA_LAYERS
    assert set(all_linear(model).target_modules) == LLAMA_LAYERS
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    assert adapted(found) == LLAMA_LAYERS
    found(input_ids=torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert len(trainable_gradients(found)) == 28


def test_all_linear_finds_accelerated_layers_that_are_no_linear() -> None:
    """HQQ's and GPTQ's, which PEFT's own rule does not find."""
    from gptq_cases import TorchLinear, gptq_layer

    model = nn.Sequential(gptq_layer(TorchLinear, 64, 64), nn.ReLU(), nn.Linear(64, 8))
    assert all_linear(model).target_modules == ["2"]
    pyquant.accelerate(model)
    assert all_linear(model).target_modules == ["0", "2"]


def test_a_layer_that_is_split_over_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    monkeypatch.setattr(type(base[0]), "is_parallel", True)
    with pytest.raises(ValueError, match="expected a whole layer, got one that is split over ranks"):
        peft.get_peft_model(base, config())


def test_llama() -> None:
    """All projections of a tiny random Llama, as a trainer calls it, and one compiled step of it."""
    model = tiny_llama()
    quantize_model(model, "nf4", nested=True, exclude=["lm_head"])
    model = peft.get_peft_model(model, config(target_modules=r".*_proj", task_type="CAUSAL_LM"))
    wrapped = [m for m in model.modules() if isinstance(m, lora.LoraQuantLinear)]
    assert len(wrapped) == 14
    tokens = torch.randint(0, 97, (2, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    assert len(trainable_gradients(model)) == 28

    block = model.base_model.model.model.layers[0].mlp
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
