"""Quantized experts under torch.compile: one graph, whatever experts the tokens choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import model_class, save_dense

pytest.importorskip("transformers", minversion="5.23")

from pyquant.hf import PyquantConfig
from pyquant.hf._experts import StackedLinear
from pyquant.hf._grouped_gemm import grouped_gemm
from pyquant.load import LoadedLayer
from pyquant.nn import QuantLinear
from pyquant.quantize import quantize

MOE = ["mixtral", "qwen_moe", "gpt_oss"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def quantized(folder: Path, name: str, **arguments: Any) -> Any:
    save_dense(folder, name)
    config = PyquantConfig("nf4", nested=True)
    return model_class(name).from_pretrained(folder, quantization_config=config, **arguments).eval()


def tokens_of(count: int, device: str = "cpu") -> torch.Tensor:
    return torch.arange(2 * count, device=device).view(2, count) * 7 % 90


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_one_graph_for_any_number_of_tokens(tmp_path: Path, name: str) -> None:
    model = quantized(tmp_path, name)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(tokens_of(6))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for count in (3, 30):
                tokens = tokens_of(count)
                torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_inductor(tmp_path: Path) -> None:
    model = quantized(tmp_path, "mixtral")
    with torch.no_grad():
        expected = model(tokens_of(6)).logits
        got = torch.compile(model, fullgraph=True)(tokens_of(6)).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MOE)
def test_gradients(tmp_path: Path, name: str) -> None:
    """Of embeddings, routers and biases, through frozen experts."""
    model = quantized(tmp_path, name)
    tokens = tokens_of(5)

    def gradients(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call(input_ids=tokens, labels=tokens).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    assert any("router" in name or "gate.weight" in name for name in expected)
    got = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert got.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-5)


def test_export(tmp_path: Path) -> None:
    model = quantized(tmp_path, "mixtral")
    experts = model.model.layers[0].mlp
    x = torch.randn(1, 6, 64)
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(experts, (x,), dynamic_shapes=({1: rows},))
    for count in (6, 17):
        x = torch.randn(1, count, 64)
        torch.testing.assert_close(program.module()(x), experts(x), rtol=1e-5, atol=1e-5)


def test_layers_side_by_side(tmp_path: Path) -> None:
    """Gate and up of checkpoints that keep them apart."""
    model = quantized(tmp_path, "mixtral")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        for i, whole in enumerate(experts.gate_up_proj):
            w = whole.weight.unpack()
            halves = [QuantLinear.from_quantized(w.narrow(0, start, 96)) for start in (0, 96)]
            experts.gate_up_proj[i] = StackedLinear(halves)
    with torch.no_grad():
        expected = model(tokens_of(6)).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens_of(6)).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_adapted_experts_break_the_graph_and_are_equal(tmp_path: Path) -> None:
    """An expert's layer that is something else is called as a module, as without compiling."""

    class Doubled(torch.nn.Module):
        def __init__(self, base: QuantLinear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.base(x)

    block = quantized(tmp_path, "mixtral").model.layers[1].mlp
    x = torch.randn(2, 6, 64)
    with torch.no_grad():
        plain = block(x)
        block.experts.down_proj[2] = Doubled(block.experts.down_proj[2])
        expected = block(x)
        assert not torch.allclose(expected, plain, rtol=1e-3, atol=1e-3)
        got = torch.compile(block, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["graph_break"]


def layers_of(n: int, k: int) -> list[QuantLinear]:
    """Four, of two formats, one of them with act-order."""
    made = []
    for i, name in enumerate(("nf4", "uint4", "nf4", "int4")):
        loaded = LoadedLayer(quantize(torch.randn(n, k), name), None, torch.randperm(k) if i == 1 else None)
        made.append(QuantLinear.from_quantized(loaded.weight, None, loaded.permutation))
    return made


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 4, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
def test_the_operator(counts: list[int]) -> None:
    """Rows of layers without any, rows behind the last layer's, layers of different formats; the gradient."""
    layers = layers_of(96, 64)
    x = torch.randn(sum(counts) + 2, 64, requires_grad=True)
    numbers = torch.tensor(counts)
    got = grouped_gemm(x, numbers, layers)
    parts = x.split([*counts, 2])
    expected = torch.cat([*(layer(part) for layer, part in zip(layers, parts, strict=False)), torch.zeros(2, 96)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(got)
    gradients = [torch.autograd.grad(y, x, upstream, allow_unused=True)[0] for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_opcheck() -> None:
    from pyquant.ops import op_arguments

    layers = layers_of(32, 64)
    arguments = [op_arguments(layer.weight) for layer in layers]
    tensors = [t for (own, _), layer in zip(arguments, layers, strict=True) for t in (*own, layer.permutation)]
    integers = [i for _, numbers in arguments for i in numbers]
    x, counts = torch.randn(6, 64, requires_grad=True), torch.tensor([2, 0, 3, 1])
    torch.library.opcheck(torch.ops.pyquant.grouped_gemm, (x, counts, tensors, integers))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(tmp_path: Path, name: str, mode: str, dtype: torch.dtype) -> None:
    """CUDA graphs leave the operator out; several calls, so that graphs are captured and replayed.

    In bf16 fused kernels round less often than single ones, so that now and then a token takes another expert: single
    logits then differ by 0.13 (of 1080, 1 to 10), and their mean counts.
    """
    model = quantized(tmp_path, name, device_map="cuda", dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for shift in range(6):
            tokens = (tokens_of(6, "cuda") + 11 * shift) % 90
            expected = model(tokens).logits
            got = compiled(tokens).logits
            if dtype is torch.float32:
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            else:
                assert (got - expected).norm() < 0.03 * expected.norm()
            assert torch.equal(expected, model(tokens).logits), "the same bits, run to run"
