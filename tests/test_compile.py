"""A quantized Llama block under torch.compile, torch.export and CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyquant import quantize_model
from pyquant.nn import QuantLinear

transformers = pytest.importorskip("transformers", reason="needs transformers")
FORMATS: dict[str, dict[str, Any]] = {"nf4": {"nested": True}, "uint4": {"group_size": 32}, "int8": {}}
GEMM = torch.ops.pyquant.gemm.default
each_format = pytest.mark.parametrize("format", FORMATS)


class Block(nn.Module):
    """A decoder layer of a tiny random Llama with its rotary embedding: hidden states in, hidden states out."""

    def __init__(self, format: str) -> None:
        super().__init__()
        settings = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1
        )
        settings._attn_implementation = "sdpa"
        model = transformers.LlamaModel(settings)
        self.rotary, self.layer = model.rotary_emb, model.layers[0]
        quantize_model(self.layer, format, **FORMATS[format])
        assert sum(isinstance(m, QuantLinear) for m in self.modules()) == 7

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        y = self.layer(x, position_embeddings=self.rotary(x, positions), position_ids=positions)
        return y[0] if isinstance(y, tuple) else y


def tokens(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, count, 64, device=device, dtype=dtype)


@each_format
def test_one_graph_for_any_number_of_tokens(format: str) -> None:
    """Forward and backward; a recompilation is an error, and each number of tokens gives the eager result."""
    block = Block(format)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 2, 9, 33):
            x = tokens(count)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = compiled(a), block(b)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            y.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_single_token_is_the_one_other_graph() -> None:
    """torch compiles sizes of 1 on their own."""
    block = Block("nf4")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for count in (5, 1, 9, 1, 33):
            x = tokens(count)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_changing_batch_compiles_twice_at_most() -> None:
    """Without dynamic=True: the second shape makes the size dynamic, the third compiles nothing."""
    block = Block("nf4")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for count in (5, 8, 12, 33):
            x = tokens(count)
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@each_format
@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export(format: str, strict: bool) -> None:
    block = Block(format).eval()
    count = torch.export.Dim("count", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(block, (tokens(5),), dynamic_shapes={"x": {1: count}}, strict=strict)
        assert sum(node.target is GEMM for node in program.graph.nodes) == 7
        for n in (2, 5, 40):
            x = tokens(n)
            torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)


def test_save_and_load_an_exported_program(tmp_path: Any) -> None:
    """The file holds the packed weights: loading needs the operators, not the modules."""
    block, x = Block("nf4").eval(), tokens(5)
    with torch.no_grad():
        torch.export.save(torch.export.export(block, (x,)), tmp_path / "block.pt2")
        loaded = torch.export.load(tmp_path / "block.pt2").module()
        assert torch.equal(loaded(x), torch.export.export(block, (x,)).module()(x))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 20, 300])
@each_format
def test_cuda_graph_of_a_block(format: str, count: int) -> None:
    """Captured once, replayed on other inputs: the eager results, bit for bit."""
    block = Block(format).eval().to("cuda", torch.bfloat16)
    x = tokens(count, "cuda", torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            block(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        for _ in range(3):
            x.copy_(tokens(count, "cuda", torch.bfloat16))
            graph.replay()
            assert torch.equal(y, block(x))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_on_the_gpu(mode: str) -> None:
    """Inductor's kernels around ours; "reduce-overhead" replays CUDA graphs of both passes."""
    block = Block("nf4").to("cuda", torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(3):
        block.zero_grad()  # gradients of the norms lie in the graphs' memory, which the next step writes
        x = tokens(16, "cuda", torch.bfloat16)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = compiled(a), block(b)
        y.sum().backward()
        expected.sum().backward()
        for got, want in ((y, expected), (a.grad, b.grad)):
            assert (got - want).float().norm() <= 0.02 * want.float().norm()
