"""QLoRA: a frozen quantized base with LoRA beside it. Gradients, what is kept for them, and torch.compile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import each_dtype, each_format, user_codebook
from lora_cases import LoRA, add_lora, dense_twin, kept_for_backward, trainable_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyquant import quantize_model
from pyquant.formats import Format
from pyquant.nn import QuantLinear


def make_model(format: str = "nf4", **arguments: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(128, 192), nn.GELU(), nn.Linear(192, 128, bias=False))
    return add_lora(quantize_model(model, format, **arguments))


def run_step(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of x and of what trains."""
    x = x.clone().requires_grad_()
    model(x).backward(upstream)
    assert x.grad is not None
    return {**trainable_gradients(model), "x": x.grad}


@each_format
@each_dtype
def test_gradients_are_those_of_the_dequantized_model(fmt: Format, dtype: torch.dtype) -> None:
    """As near to the exact ones as those of the dense model in the same dtype, within the contract's factor."""
    model = make_model(fmt.name, codebook=user_codebook(fmt) if fmt.needs_codebook else None)
    exact_model = dense_twin(model, torch.float64)
    dense = dense_twin(model)
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    x, upstream = torch.randn(6, 128).to(dtype), torch.randn(6, 128).to(dtype)
    exact = run_step(exact_model, x.double(), upstream.double())
    base = run_step(dense, x, upstream)
    got = run_step(model, x, upstream)
    assert got.keys() == exact.keys() == {"0.a", "0.b", "2.a", "2.b", "x"}
    for name, value in exact.items():
        budget = 1.5 * (base[name] - value).norm() + 1e-6 * value.norm()
        assert got[name].dtype == base[name].dtype
        assert (got[name] - value).norm() <= budget, name


def test_the_base_stays_as_it_is_while_lora_learns() -> None:
    model = make_model("nf4", nested=True)
    weights = [m.weight.dequantize() for m in model.modules() if isinstance(m, QuantLinear)]
    x, target = torch.randn(64, 128), torch.randn(64, 128)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for module, weight in zip((m for m in model.modules() if isinstance(m, QuantLinear)), weights, strict=True):
        assert torch.equal(module.weight.dequantize(), weight)


class MatMul4Bit(torch.autograd.Function):
    """What bitsandbytes' function of this name keeps: the packed weight, from which backward dequantizes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: QuantLinear) -> torch.Tensor:
        ctx.module = module
        bias = None if module.bias is None else module.bias.to(x.dtype)
        return nn.functional.linear(x, module.weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.module.weight.dequantize(grad.dtype), None


class Linear4bit(nn.Module):
    def __init__(self, inner: QuantLinear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return MatMul4Bit.apply(x, self.inner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_keeps_no_more_than_bitsandbytes(dtype: torch.dtype) -> None:
    model = make_model("nf4", nested=True)
    theirs = copy.deepcopy(model)
    for lora in theirs.modules():
        if isinstance(lora, LoRA):
            lora.base = Linear4bit(lora.base)
    x = torch.randn(6, 128).to(dtype).requires_grad_()
    kept = kept_for_backward(model, lambda: model(x))
    bytes_kept = sum(t.nbytes for t in kept)
    assert bytes_kept <= sum(t.nbytes for t in kept_for_backward(theirs, lambda: theirs(x)))
    weight = 128 * 192
    assert all(t.numel() < weight for t in kept)

    # The measure sees a weight that is kept.
    def dequantized() -> torch.Tensor:
        return nn.functional.linear(x, model[0].base.weight.dequantize(dtype))

    assert max(t.numel() for t in kept_for_backward(model, dequantized)) == weight


def test_a_step_keeps_no_more_than_bitsandbytes_itself() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")

    def kept_bytes(base: nn.Module) -> int:
        torch.manual_seed(0)
        model, x = LoRA(base), torch.randn(6, 128, dtype=torch.bfloat16, requires_grad=True)
        return sum(t.nbytes for t in kept_for_backward(model, lambda: model(x)))

    theirs = bitsandbytes.nn.Linear4bit(128, 192, compute_dtype=torch.bfloat16, quant_type="nf4")
    mine = QuantLinear.from_linear(nn.Linear(128, 192), "nf4", nested=True)
    assert kept_bytes(mine) <= kept_bytes(theirs.to("cpu"))


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", "inductor"])
def test_compiled_step(backend: str) -> None:
    """Forward and backward as graphs of any number of tokens. Also Inductor's partition between the two, which may move
    work of the backward pass into the forward one, keeps no dequantized weight."""
    model = make_model("nf4", nested=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (6, 3, 17):
            x, upstream = torch.randn(tokens, 128), torch.randn(tokens, 128)
            expected = run_step(model, x, upstream)
            model.zero_grad()
            got = run_step(compiled, x, upstream)
            model.zero_grad()
            names = {name.removeprefix("_orig_mod."): g for name, g in got.items()}
            assert names.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(names[name], value, rtol=1e-5, atol=1e-5)
        x = torch.randn(6, 128, requires_grad=True)
        kept = kept_for_backward(model, lambda: compiled(x))
        assert all(t.numel() < 128 * 192 for t in kept)


def test_activation_checkpointing() -> None:
    model = make_model()
    x, upstream = torch.randn(6, 128), torch.randn(6, 128)
    expected = run_step(model, x, upstream)
    model.zero_grad()
    a = x.clone().requires_grad_()
    y = checkpoint(model, a, use_reentrant=False)
    y.backward(upstream)
    assert torch.equal(a.grad, expected["x"])
    for name, gradient in trainable_gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [512, 4096])
def test_peak_memory_of_a_step_is_not_above_bitsandbytes(tokens: int) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    n, k, layers = 4096, 4096, 4

    def peak(make: Any) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = nn.Sequential(*[LoRA(make()).cuda() for _ in range(layers)])
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            optimizer.zero_grad()
            model(x).float().square().mean().backward()
            optimizer.step()
        return torch.cuda.max_memory_allocated() - before

    def theirs() -> nn.Module:
        layer = bitsandbytes.nn.Linear4bit(
            k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True
        )
        return layer.cuda()

    def ours() -> nn.Module:
        return QuantLinear.from_linear(nn.Linear(k, n, bias=False, device="cuda"), "nf4", nested=True)

    mine, others = peak(ours), peak(theirs)
    assert mine <= 1.01 * others, f"{mine / 2**20:.1f} MiB, bitsandbytes {others / 2**20:.1f} MiB"


@pytest.mark.gpu
def test_a_step_on_the_gpu() -> None:
    model = make_model("nf4", nested=True).cuda()
    exact_model, dense = dense_twin(model.cpu(), torch.float64), dense_twin(model)
    for module in dense.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    x, upstream = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    exact = run_step(exact_model, x.double(), upstream.double())
    base = run_step(dense.cuda(), x.cuda(), upstream.cuda())
    got = run_step(model.cuda(), x.cuda(), upstream.cuda())
    for name, value in exact.items():
        budget = 1.5 * (base[name].cpu() - value).norm() + 1e-6 * value.norm()
        assert (got[name].cpu() - value).norm() <= budget, name
