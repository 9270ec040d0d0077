"""accelerate on AWQ layers: gptqmodel's where it is installed, else stand-ins. What they share with GPTQ's layers is in
test_accelerate_gptq.py."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import assert_same_bits, state_of
from awq_cases import AwqTorchLinear, WQLinear_GEMM, awq_layer, gptqmodel_awq_layer, write_awq_llama
from conftest import assert_within_budget
from torch import nn

from pyquant import accelerate


def autoawq(*shape: int, **arguments: Any) -> Any:
    return awq_layer(WQLinear_GEMM, *shape, **arguments)


def stand_in(*shape: int, **arguments: Any) -> Any:
    return awq_layer(AwqTorchLinear, *shape, **arguments)


each_source = pytest.mark.parametrize(
    "layer", [autoawq, stand_in, gptqmodel_awq_layer], ids=["autoawq", "stand-in", "gptqmodel"]
)


def exact(layer: Any) -> torch.Tensor:
    """The weight [N, K] in float64, by the stand-in's arithmetic."""
    twin = WQLinear_GEMM({name: getattr(layer, name) for name in ("qweight", "qzeros", "scales")}, None)
    twin.scales = twin.scales.double()
    return twin.dequantize_weight().t()


@each_source
@pytest.mark.parametrize("symmetric", [False, True])
def test_replaces_frees_and_undoes(layer: Any, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(96, 64, symmetric=symmetric)
    x = torch.randn(2, 5, 64).half()
    expected, state, weight = module(x), state_of(module), exact(module)
    attributes, kind = set(module.__dict__), type(module)
    storages = [weakref.ref(getattr(module, name).untyped_storage()) for name in ("qweight", "qzeros", "scales")]
    with monkeypatch.context() as patch:
        done = accelerate(module, free_original=True)
        assert [s() for s in storages] == [None] * 3
        assert f"{'int4' if symmetric else 'uint4'}, 96x64, group_size=32" in done.replaced[""]
        assert type(module) is kind
        for name in ("dequantize_weight", "_dequantize_weight_for_inference"):
            patch.setattr(kind, name, None, raising=False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert_within_budget(module(x.to(dtype)), x.to(dtype), weight, module.bias.to(dtype))
        assert_same_bits(module.state_dict(), state)
    done.undo()
    assert_same_bits(module.state_dict(), state)
    assert set(module.__dict__) == attributes
    assert torch.equal(module(x), expected)


@each_source
def test_changes_copies_and_loading(layer: Any) -> None:
    module, other = layer(96, 64, bias=False), layer(96, 64, bias=False)
    with torch.no_grad():
        other.qweight.bitwise_not_()
    x = torch.randn(3, 64)
    accelerate(module, free_original=True)
    twin = copy.deepcopy(module)
    twin.load_state_dict(other.state_dict())
    assert twin.qweight.numel() == 0
    assert_within_budget(twin(x), x, exact(other))
    assert not torch.allclose(twin(x), module(x))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    module.bfloat16()
    assert module.state_dict()["scales"].dtype == torch.bfloat16


def test_what_is_kept() -> None:
    model = nn.ModuleDict({name: stand_in(96, 64) for name in ("good", "bits", "gemv", "nan")})
    model["bits"].bits = 3
    model["gemv"].qweight = torch.zeros(96, 8, dtype=torch.int32)  # [N, K / 8]
    model["nan"].scales[0, 0] = torch.nan
    done = accelerate(model)
    assert list(done.replaced) == ["good"]
    assert done.kept.pop("bits") == "AWQ in 3 bits, for which there is no loader"
    assert "expected int32 words of 64 inputs with 4 bits, got torch.int32 [96, 8]" in done.kept.pop("gemv")
    assert "load.awq: nan.scales: expected finite values" in done.kept.pop("nan")
    assert not done.kept


def test_a_llama_loaded_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for package in ("gptqmodel", "optimum", "accelerate"):
        pytest.importorskip(package)
    write_awq_llama(tmp_path)
    settings = transformers.AwqConfig(bits=4, backend="torch_awq")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float16, quantization_config=settings
    ).eval()
    state, tokens = state_of(model), torch.arange(6)[None]
    done = accelerate(model, free_original=True)
    assert len(done.replaced) == 14
    assert list(done.kept) == ["lm_head"]
    assert_same_bits(model.state_dict(), state)
    with torch.no_grad():
        got = model(tokens).logits
        done.undo()
        expected = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.005)


@pytest.mark.gpu
@each_source
def test_on_the_gpu(layer: Any) -> None:
    module = layer(96, 64)
    weight, state = exact(module), state_of(module)
    done = accelerate(module, free_original=True)
    module.to("cuda")
    assert module.qweight.is_cuda
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 64, device="cuda").to(dtype)
        assert_within_budget(module(x), x, weight.cuda(), module.bias.to(dtype))
    done.undo()
    assert_same_bits(module.cpu().state_dict(), state)
