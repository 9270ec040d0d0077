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
        ({"target_modules": "all-linear"}, r"register: target_modules: expected names of modules, got 'all-linear'"),
    ],
    ids=["dora", "pissa", "fan_in_fan_out", "all-linear"],
)
def test_what_needs_the_dense_weight_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(make_base(), config(**arguments))


def test_a_layer_that_is_split_over_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    monkeypatch.setattr(type(base[0]), "is_parallel", True)
    with pytest.raises(ValueError, match="expected a whole layer, got one that is split over ranks"):
        peft.get_peft_model(base, config())


def test_llama() -> None:
    """All projections of a tiny random Llama, as a trainer calls it, and one compiled step of it."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    settings = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    model = transformers.LlamaForCausalLM(settings)
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
