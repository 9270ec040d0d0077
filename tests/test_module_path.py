"""Errors of a quantized layer's GEMM say where in the model it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from awq_cases import AwqTorchLinear, awq_layer
from bitsandbytes_cases import Linear4bit
from gptq_cases import TorchLinear, gptq_layer
from test_accelerate_hqq import HQQLinear
from torch import nn

from pyquant import accelerate, quantize_model
from pyquant.nn import QuantLinear

each = pytest.mark.parametrize


class Block(nn.Module):
    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Model(nn.Module):
    """Not a chain of Sequentials only: a module is called by methods of others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), nn.Sequential(Block(layer))])

    def run_all(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run_all(x)


def quantized() -> QuantLinear:
    return QuantLinear.from_linear(nn.Linear(64, 96), "nf4")


def act_order() -> QuantLinear:
    layer = quantized()
    return QuantLinear(layer.weight, layer.bias, torch.randperm(64))


ACCELERATED: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes": lambda: Linear4bit(64, 96),
    "hqq": lambda: HQQLinear(nn.Linear(64, 96), 32, torch.float32),
    "gptq": lambda: gptq_layer(TorchLinear, 96, 64, act_order=True),
    "awq": lambda: awq_layer(AwqTorchLinear, 96, 64),
}


@each("make", [quantized, act_order])
@each("grad", [True, False])
def test_quant_linear(make: Callable[[], QuantLinear], grad: bool) -> None:
    model = Model(make())
    with torch.set_grad_enabled(grad):
        model(torch.randn(2, 64))
        with pytest.raises(RuntimeError, match=r"^layers\.1\.0\.up: gemm: x has K=65, the weight has K=64$"):
            model(torch.randn(2, 65))
        with pytest.raises(RuntimeError, match=r"^layers\.1\.0\.up: gemm: x: expected Float, Half or .*got Double$"):
            model(torch.randn(2, 64).double())
        if make is quantized:
            with pytest.raises(NotImplementedError, match=r"^layers\.1\.0\.up: Could not run 'pyquant::gemm'"):
                model(torch.randn(2, 64).to_sparse())


@pytest.mark.gpu
@each("make", [quantized, act_order])
@each("grad", [True, False])
def test_another_device(make: Callable[[], QuantLinear], grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        for model, x in (
            (Model(make()).cuda(), torch.randn(2, 64)),
            (Model(make()), torch.randn(2, 64, device="cuda")),
        ):
            with pytest.raises(RuntimeError, match=r"(?i)^layers\.1\.0\.up: .*(cpu|cuda|device)"):
                model(x)


def test_a_model_whose_constructor_runs_a_layer() -> None:
    class Probing(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            layer(torch.randn(2, 65))
            super().__init__()

    with pytest.raises(RuntimeError, match=r"^QuantLinear: gemm: x has K=65"):
        Probing(quantized())


def test_the_path_is_the_present_one() -> None:
    """A layer is called by itself, through a part of the model, in a copy, and after it was moved in the model."""
    model = quantize_model(Model(nn.Linear(64, 96)), "nf4")
    x = torch.randn(2, 65)
    layer = model.layers[1][0].up
    for call, path in (
        (layer, "QuantLinear"),
        (model.layers[1], r"0\.up"),
        (copy.deepcopy(model), r"layers\.1\.0\.up"),
        (nn.Sequential(model), r"0\.layers\.1\.0\.up"),
    ):
        with pytest.raises(RuntimeError, match=rf"^{path}: gemm: x has K=65"):
            call(x)
    model.layers[0] = layer
    del model.layers[1]
    with pytest.raises(RuntimeError, match=r"^layers\.0: gemm: x has K=65"):
        model(x)


@each("name", ACCELERATED)
def test_accelerated(name: str) -> None:
    model = Model(ACCELERATED[name]()).eval()
    done = accelerate(model)
    assert list(done.replaced) == ["layers.1.0.up"]
    model(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match=r"^layers\.1\.0\.up: gemm: x has K=65, the weight has K=64$"):
        model(torch.randn(2, 65))


def test_other_errors_keep_their_type_and_cause() -> None:
    """What the layer raises is the error itself, not another one in its place."""
    model = Model(quantized())
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 65))
    assert type(caught.value) is RuntimeError
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@each("make", [quantized, act_order, *ACCELERATED.values()], ids=["plain", "act-order", *ACCELERATED])
def test_compiled(make: Callable[[], nn.Module]) -> None:
    """The handlers are no graph break, and an error of tracing still says what is wrong."""
    model = Model(make()).eval()
    if not isinstance(model.layers[1][0].up, QuantLinear):
        accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        with pytest.raises(Exception, match="the weight has K=64"):
            compiled(torch.randn(2, 65))
