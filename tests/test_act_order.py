"""GPTQ's act-order in QuantLinear: a permutation of x's columns, stored beside the weight."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import VARIANTS, assert_within_budget, each_dtype, random_weight
from load_cases import gptq_tensors

from pyquant import load
from pyquant.nn import QuantLinear

PLAIN = VARIANTS[0]


def loaded(seed: int = 0) -> load.LoadedLayer:
    """A 4-bit GPTQ layer [32, 128] with shuffled groups of 32."""
    rng = np.random.default_rng(seed)
    codes, zeros = rng.integers(0, 16, (32, 128)), rng.integers(1, 17, (32, 4))
    scales = rng.uniform(0.01, 0.1, (32, 4)).astype(np.float16)
    g_idx = rng.permutation(np.arange(128) // 32)
    layer = load.gptq(gptq_tensors(codes, zeros, scales, g_idx, 4, 1), "p", group_size=32)
    assert layer.permutation is not None
    return layer


def make_layer(seed: int = 0) -> QuantLinear:
    layer = loaded(seed)
    return QuantLinear.from_quantized(layer.weight, torch.linspace(-1, 1, 32), layer.permutation)


@each_dtype
def test_computes_with_the_layers_own_weight(dtype: torch.dtype) -> None:
    """The reference knows no permutation: the loader's dequantized weight in the order of the inputs."""
    layer, exact = make_layer(), loaded().dequantize().double()
    for x in (torch.randn(5, 128), torch.randn(2, 3, 128), torch.randn(128)):
        assert_within_budget(layer(x.to(dtype)).detach(), x.to(dtype), exact, layer.bias.detach().to(dtype))
    assert "act_order=True" in repr(layer)


def test_gradients() -> None:
    layer, dense = make_layer(), loaded().dequantize()
    x = torch.randn(5, 128, requires_grad=True)
    upstream = torch.randn(5, 32)
    layer(x).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ dense, rtol=1e-5, atol=1e-5)


def test_compile_and_export() -> None:
    layer, x = make_layer(), torch.randn(5, 128)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_state_dict_round_trips_with_and_without() -> None:
    """The permutation comes from the state dict, whichever layer loads it."""
    x, ordered = torch.randn(5, 128), make_layer()
    natural = QuantLinear.from_quantized(loaded().weight, torch.zeros(32))
    assert "permutation" not in natural.state_dict()
    for source in (ordered, natural):
        for target in (make_layer(1), copy.deepcopy(natural)):
            target.load_state_dict(source.state_dict())
            assert torch.equal(target(x), source(x))
            assert target.state_dict().keys() == source.state_dict().keys()
    model = torch.nn.ModuleDict({"a": make_layer(1)})
    model.load_state_dict({"a." + name: t for name, t in ordered.state_dict().items()})
    assert torch.equal(model["a"](x), ordered(x))


def test_a_permutation_without_its_weight_is_reported() -> None:
    layer, x = make_layer(), torch.randn(5, 128)
    before = layer(x)
    result = layer.load_state_dict({"permutation": torch.arange(128)}, strict=False)
    assert result.unexpected_keys == ["permutation"]
    assert torch.equal(layer(x), before)


def test_copies_and_casts_keep_it() -> None:
    layer, x = make_layer(), torch.randn(5, 128)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    half = copy.deepcopy(layer).half()
    assert torch.equal(half.permutation, layer.permutation)


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        (torch.arange(127), r"expected torch.int64 \[128\], got torch.int64 \[127\]"),
        (torch.arange(128).int(), r"expected torch.int64 \[128\], got torch.int32 \[128\]"),
        (torch.zeros(128, dtype=torch.int64), "expected every number from 0 to 127 once"),
        (torch.arange(128) + 1, "expected every number from 0 to 127 once"),
    ],
    ids=["short", "int32", "repeated", "out of range"],
)
def test_wrong_permutations(permutation: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="QuantLinear: permutation: " + message):
        QuantLinear.from_quantized(loaded().weight, None, permutation)
    layer, x = make_layer(), torch.randn(5, 128)
    before = layer(x)
    with pytest.raises(RuntimeError, match="QuantLinear: permutation: " + message):
        layer.load_state_dict({**make_layer(1).state_dict(), "permutation": permutation})
    assert torch.equal(layer(x) - layer.bias, before - layer.bias)


def test_a_wrong_k_is_an_error() -> None:
    """Not the first K columns of a wider x."""
    for k in (127, 129):
        with pytest.raises(RuntimeError, match=f"gemm: x has K={k}, the weight has K=128"):
            make_layer()(torch.randn(5, k))


def test_without_act_order_nothing_is_stored() -> None:
    layer = QuantLinear.from_quantized(random_weight(PLAIN, 33, 70))
    assert layer.permutation is None
    assert "act_order" not in repr(layer)


@pytest.mark.gpu
@each_dtype
def test_on_the_gpu(dtype: torch.dtype) -> None:
    """A layer that moves takes its permutation along; one that is loaded on the GPU has it there."""
    layer, exact = make_layer().to("cuda"), loaded().dequantize().double().cuda()
    x = torch.randn(5, 128, device="cuda").to(dtype)
    assert_within_budget(layer(x).detach(), x, exact, layer.bias.detach().to(dtype), dense=True)
    other = QuantLinear.from_quantized(random_weight(PLAIN, 32, 128)).cuda()
    other.bias = torch.nn.Parameter(torch.zeros(32, device="cuda"))
    other.load_state_dict(make_layer().state_dict())
    assert other.permutation is not None
    assert other.permutation.is_cuda
    assert torch.equal(other(x), layer(x))
