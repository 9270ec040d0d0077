"""accelerate on HQQ's modules: the real ones where hqq is installed, else a stand-in written from its documents."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import assert_within_budget
from torch import nn

from pyquant import accelerate
from pyquant._freed import FreedTensor

BITS = [4, 3, 2, 1]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class HQQLinear(nn.Module):
    """What ``hqq.core.quantize.HQQLinear`` keeps, how it moves, and its state_dict; 4 bits, axis 1."""

    def __init__(self, linear: nn.Linear, group_size: int, compute_dtype: torch.dtype) -> None:
        super().__init__()
        n, k = linear.weight.shape
        rows = linear.weight.detach().view(-1, group_size)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = ((high - low) / 15).to(compute_dtype)
        zero = (-low / scale).to(compute_dtype)
        codes = (rows / scale + zero).round().clamp(0, 15).to(torch.uint8)
        half = len(codes) // 2
        self.W_q = nn.Parameter(codes[:half] << 4 | codes[half:], requires_grad=False)
        self.meta = {"scale": scale, "zero": zero, "shape": torch.Size((n, k)), "axis": 1, "packing": "4bit_u8",
                     "group_size": group_size, "nbits": 4}  # fmt: skip
        self.bias = None if linear.bias is None else linear.bias.detach().to(compute_dtype)
        self.compute_dtype = compute_dtype

    def dequantize(self) -> torch.Tensor:
        codes = torch.cat([self.W_q >> 4, self.W_q & 15]).to(self.compute_dtype)
        return ((codes - self.meta["zero"]) * self.meta["scale"]).view(self.meta["shape"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.dequantize().T
        return y if self.bias is None else y + self.bias

    def cuda(self, device: Any) -> nn.Module:
        self.meta |= {"scale": self.meta["scale"].to(device), "zero": self.meta["zero"].to(device)}
        self.W_q = nn.Parameter(self.W_q.to(device), requires_grad=False)
        return self

    def state_dict(self, *_: Any, **keywords: Any) -> dict[str, Any]:
        state = {"W_q": self.W_q, "scale": self.meta["scale"], "zero": self.meta["zero"]}
        for name, tensor in state.items():
            if "destination" in keywords:
                keywords["destination"][keywords["prefix"] + name] = tensor
        return state


HQQLinear.__module__ = "hqq.core.quantize"


def stand_in(k: int, n: int, bias: bool = True, group_size: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    return HQQLinear(nn.Linear(k, n, bias), group_size, dtype)


def real(
    k: int, n: int, bias: bool = True, group_size: int = 32, dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(**({"nbits": 4, "group_size": group_size, "axis": 1} | more))
    return core.HQQLinear(nn.Linear(k, n, bias), config, compute_dtype=dtype, device="cpu")


each_source = pytest.mark.parametrize("linear", [stand_in, real], ids=["stand-in", "hqq"])


def model_of(linear: Any) -> nn.Module:
    return nn.Sequential(linear(64, 96), nn.ReLU(), linear(96, 64, bias=False), nn.Linear(64, 8))


def tensors_of(module: Any) -> dict[str, torch.Tensor]:
    return {"W_q": module.W_q.detach().clone(), **{name: module.meta[name].clone() for name in ("scale", "zero")}}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name


@each_source
def test_replaces_and_undoes(linear: Any) -> None:
    model = model_of(linear)
    x = torch.randn(2, 5, 64)
    expected, classes = model(x), [type(m) for m in model]
    done = accelerate(model)
    assert list(done.replaced) == ["0", "2"]
    assert "uint4" in done.replaced["0"]
    assert [type(m) for m in model] == classes
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert accelerate_again(model) == "accelerated already"
    done.undo()
    assert torch.equal(model(x), expected)
    assert "forward" not in model[0].__dict__
    assert not done.replaced


def accelerate_again(model: nn.Module) -> str:
    with pytest.raises(ValueError, match="HQQLinear or layer of GPTQ or AWQ that could be replaced") as caught:
        accelerate(model)
    return str(caught.value).split("0: ")[1].split("\n")[0]


@each_source
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_runs_pyquants_kernel(linear: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(64, 96, dtype=dtype)
    scale, zero = (layer.meta[name].double() for name in ("scale", "zero"))
    codes = torch.cat([layer.W_q >> 4, layer.W_q & 15]).double()
    weight = ((codes - zero) * scale).view(96, 64)
    accelerate(layer)
    monkeypatch.setattr(type(layer), "dequantize", None)
    x = torch.randn(3, 64).to(dtype)
    assert_within_budget(layer(x), x, weight, layer.bias)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("view_as_float", [False, True])
def test_all_bits_are_freed_and_restored(bits: int, view_as_float: bool) -> None:
    layer = real(64, 88, nbits=bits, view_as_float=view_as_float)
    x = torch.randn(3, 64)
    expected, stored = layer(x), tensors_of(layer)
    done = accelerate(layer, free_original=True)
    assert layer.W_q.numel() == 0
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    done.restore_original()
    assert_same(tensors_of(layer), stored)
    assert torch.equal(layer(x), layer(x))


@each_source
def test_free_and_restore(linear: Any) -> None:
    model = model_of(linear)
    x = torch.randn(2, 64)
    expected, stored = model(x), tensors_of(model[0])
    state = {name: t.clone() for name, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    done = accelerate(model, free_original=True)
    assert isinstance(model[0].meta["scale"], FreedTensor)
    with pytest.raises(RuntimeError, match="restore_original"):
        model[0].dequantize()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)

    saved = model.state_dict()
    assert {"0.W_q", "2.scale"} < state.keys()
    assert all(torch.equal(saved[name], t) for name, t in state.items())
    assert model[0].W_q.numel() == 0, "state_dict leaves the bytes there"
    assert_same(model[0].state_dict(), stored)

    model[0].cuda("cpu")  # HQQ's way to move
    assert model[0].W_q.numel() == 0
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    nn.Sequential(model).to("cpu")
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert model[0].W_q.numel() == 0
    done.restore_original()
    assert_same(tensors_of(model[0]), stored)
    done.undo()
    assert torch.equal(model(x), expected)


@each_source
def test_changes_are_seen(linear: Any) -> None:
    model = model_of(linear)
    x = torch.randn(2, 64)
    accelerate(model)
    with torch.no_grad():
        model[0].W_q.fill_(0)
    y = model[0](x)
    torch.testing.assert_close(y, x @ model[0].dequantize().T + model[0].bias, rtol=1e-5, atol=1e-5)
    model[0].meta["scale"] = model[0].meta["scale"] * 2
    torch.testing.assert_close(model[0](x) - model[0].bias, 2 * (y - model[0].bias), rtol=1e-5, atol=1e-5)
    model[0].meta["scale"] *= 2  # in place
    torch.testing.assert_close(model[0](x) - model[0].bias, 4 * (y - model[0].bias), rtol=1e-5, atol=1e-5)


@each_source
def test_compute_dtype_gradients_and_compile(linear: Any) -> None:
    layer = linear(64, 96)
    accelerate(layer, compute_dtype=torch.bfloat16)
    x = torch.randn(3, 64, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64), rtol=0.02, atol=0.02)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = model_of(stand_in)
    done = accelerate(model, free_original=True)
    x = torch.randn(2, 64)
    expected, twin = model(x), copy.deepcopy(model)
    done.undo()
    assert torch.equal(twin(x), expected)
    assert twin[0].W_q.numel() == 0
    assert_same(twin[0].state_dict(), tensors_of(model[0]))


def test_a_llama() -> None:
    """transformers 5.23 has no loader for HQQ; users replace modules as HQQ's documents say."""
    transformers = pytest.importorskip("transformers")
    core = pytest.importorskip("hqq.core.quantize")
    config = transformers.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=90,
                                      num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    settings = core.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, core.HQQLinear(module, settings, compute_dtype=torch.float32, device="cpu"))
    tokens = torch.arange(6)[None]
    expected = model(tokens).logits
    done = accelerate(model, free_original=True)
    assert len(done.replaced) == 14
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_what_is_kept() -> None:
    model = nn.Sequential(stand_in(64, 96), stand_in(96, 64), stand_in(64, 64), stand_in(64, 8))
    model[1].meta["axis"] = 0
    model[2].meta["zero_scale"] = torch.zeros(1)
    model[3].forward = lambda x: x
    done = accelerate(model)
    assert list(done.replaced) == ["0"]
    assert "load.hqq: 1.axis: expected 1, got 0: axis 0 groups run across output channels" in done.kept["1"]
    assert done.kept["2"] == "its scales and zeros are offloaded (offload_meta)"
    assert done.kept["3"] == "its forward is replaced by another library"


@pytest.mark.gpu
@each_source
def test_on_the_gpu(linear: Any) -> None:
    layer = linear(64, 96, dtype=torch.float16)
    layer.bias = layer.bias.cuda()
    x = torch.randn(3, 64, device="cuda", dtype=torch.float16)
    layer.cuda("cuda")
    expected = layer(x)
    accelerate(layer, free_original=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
    assert layer.W_q.is_cuda
    assert layer.W_q.numel() == 0
