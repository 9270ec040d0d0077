"""accelerate: what it replaces, what stays as it was, what it frees, and that all of it can be undone."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate_cases import assert_same_bits, state_of
from bitsandbytes_cases import Linear4bit, dense, quantize_4bit
from conftest import assert_within_budget
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyquant
from pyquant import accelerate

SIZE = 64


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def real_linear4bit(k: int, n: int, bias: bool = True, nested: bool = False, storage=torch.uint8) -> nn.Module:
    """bitsandbytes' own, quantized on the CPU."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(k, n, bias, compress_statistics=nested, quant_type="nf4", quant_storage=storage)
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = False  # else its forward rounds the scales of the weight, for good
    return layer


def stand_in(k: int, n: int, bias: bool = True, **arguments: Any) -> nn.Module:
    return Linear4bit(k, n, bias, **arguments)


each_source = pytest.mark.parametrize("linear", [stand_in, real_linear4bit], ids=["stand-in", "bitsandbytes"])


class Block(nn.Module):
    """The linear layers of a Llama block, with all kinds of absmax, bias and storage."""

    def __init__(self, linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(SIZE)
        self.qkv = linear(SIZE, 3 * SIZE, nested=True)
        self.o = linear(SIZE, SIZE, bias=False)
        self.up = linear(SIZE, 128, bias=False, nested=True, storage=torch.bfloat16)
        self.down = linear(128, SIZE, storage=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, linear) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(linear), Block(linear))
        self.head = nn.Linear(SIZE, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x))


NAMES = [f"blocks.{i}.{name}" for i in range(2) for name in ("qkv", "o", "up", "down")]


@each_source
def test_replaces_and_keeps(linear) -> None:
    model = Model(linear)
    x = torch.randn(2, 5, SIZE)
    expected, state = model(x), state_of(model)
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    quant_states = {name: model.get_submodule(name).weight.quant_state for name in NAMES}
    done = accelerate(model)
    assert list(done.replaced) == NAMES
    assert done.kept == {"head": "not quantized; pyquant.quantize_model quantizes it"}
    assert "8 modules replaced, 1 kept" in str(done)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for name, parameter in model.named_parameters():
        assert parameters[name] is parameter
    for name, quant_state in quant_states.items():
        assert model.get_submodule(name).weight.quant_state is quant_state
    assert_same_bits(model.state_dict(), state)


@each_source
def test_runs_pyquants_kernel(linear, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear(SIZE, 96)
    weight = dense(layer.weight.data, layer.weight.quant_state).double()
    done = accelerate(layer)
    assert list(done.replaced) == [""]
    monkeypatch.setattr(type(layer), "forward", None)
    x = torch.randn(3, SIZE)
    assert_within_budget(layer(x), x, weight, layer.bias.detach())


@each_source
@pytest.mark.parametrize("at_once", [True, False])
def test_free_and_restore(linear, at_once: bool) -> None:
    """Freed bytes are gone, state_dict has them, restored ones are the same bits."""
    model = Model(linear)
    x = torch.randn(2, SIZE)
    with torch.no_grad():  # bitsandbytes' graph would keep the weights
        expected, state = model(x), state_of(model)
    down = model.blocks[0].down.weight
    storages = [weakref.ref(t.untyped_storage()) for t in (down, down.quant_state.absmax)]
    done = accelerate(model, free_original=at_once)
    if not at_once:
        done.free_original()
    assert [s() for s in storages] == [None, None]
    assert model.blocks[0].down.weight is down
    assert (down.shape, down.dtype) == ((0, 1), torch.float32)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(model.state_dict(), state)
    with pytest.raises(RuntimeError, match=re.escape("call restore_original()")):
        down.quant_state.absmax + 1
    done.restore_original()
    assert_same_bits(model.state_dict(), state)
    assert torch.equal(down.quant_state.absmax, state["blocks.0.down.weight.absmax"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "k"), [(3, 5), (33, 70)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_restores_padding(n: int, k: int, storage: torch.dtype) -> None:
    """Bits behind the last code are the producer's."""
    layer = Linear4bit(k, n, storage=storage)
    layer.weight.data.view(-1).view(torch.uint8)[-1] |= 0x0B
    state = state_of(layer)
    done = accelerate(layer, free_original=True)
    done.undo()
    assert_same_bits(layer.state_dict(), state)


@each_source
def test_undo(linear) -> None:
    model = Model(linear)
    x = torch.randn(2, SIZE)
    expected, state = model(x), state_of(model)
    attributes = {name: set(model.get_submodule(name).__dict__) for name in NAMES}
    done = accelerate(model, free_original=True)
    done.undo()
    done.undo()
    assert torch.equal(model(x), expected)
    assert_same_bits(model.state_dict(), state)
    assert {name: set(model.get_submodule(name).__dict__) for name in NAMES} == attributes
    assert list(accelerate(model).replaced) == NAMES


@each_source
def test_gradients(linear) -> None:
    """Of the inputs, through frozen weights, and of a bias."""
    model = Model(linear)
    x = torch.randn(2, SIZE, requires_grad=True)
    wanted = [x, model.blocks[0].qkv.bias, model.head.weight]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    accelerate(model, free_original=True)
    for a, b in zip(torch.autograd.grad(model(x).square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@each_source
@pytest.mark.parametrize("freed", [False, True])
def test_compiles_without_graph_break(linear, freed: bool) -> None:
    """And once for all M >= 2."""
    model = Model(linear)
    accelerate(model, free_original=freed)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 7):
        x = torch.randn(m, SIZE)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("own", "asked", "x_dtype", "computed"),
    [
        (None, None, torch.bfloat16, torch.bfloat16),
        (torch.float32, None, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    ],
)
def test_compute_dtype(own, asked, x_dtype, computed, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear4bit(SIZE, 32, compute_dtype=own)
    accelerate(layer, compute_dtype=asked)
    x = torch.randn(3, SIZE).to(x_dtype)
    y = layer(x)
    packed = layer._pyquant.packed.weight
    expected = pyquant.linear(x.to(computed), packed, layer.bias.to(computed)).to(x_dtype)
    assert torch.equal(y, expected)
    assert layer.bias.dtype == torch.float32


@each_source
@pytest.mark.parametrize("freed", [False, True])
def test_deepcopy_and_moves(linear, freed: bool) -> None:
    model = Model(linear)
    x = torch.randn(2, SIZE)
    state, expected = state_of(model), model(x)
    accelerate(model, free_original=freed)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.blocks[0].qkv.bias.zero_()
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)
    assert twin.blocks[0].qkv._pyquant.packed.parameter is twin.blocks[0].qkv.weight
    packed = twin.blocks[0].qkv._pyquant.packed.weight
    twin.to("cpu").eval()
    assert twin.blocks[0].qkv._pyquant.packed.weight is packed, "nothing moved, so nothing is packed again"
    assert twin.blocks[0].qkv._pyquant.packed.freed is freed
    assert_same_bits(twin.state_dict(), state)


def test_changed_and_replaced_weights() -> None:
    """In place, and as PEFT's merge does, with a new parameter."""
    layer = Linear4bit(SIZE, 32, bias=False)
    done = accelerate(layer)
    x = torch.randn(3, SIZE)
    layer(x)
    with torch.no_grad():
        layer.weight.copy_(layer.weight ^ 0x11)
    assert_within_budget(layer(x), x, dense(layer.weight.data, layer.weight.quant_state).double())
    other = Linear4bit(SIZE, 32)
    compiled = torch.compile(layer, backend="eager")
    compiled(x)
    layer.weight = other.weight
    weight = dense(other.weight.data, other.weight.quant_state).double()
    assert_within_budget(layer(x), x, weight)
    assert_within_budget(compiled(x), x, weight)
    done.undo()
    assert_within_budget(layer(x), x, weight)


def test_shared_weight_is_packed_once() -> None:
    model = nn.ModuleList([Linear4bit(SIZE, SIZE), Linear4bit(SIZE, SIZE)])
    model[1].weight = model[0].weight
    state = state_of(model)
    done = accelerate(model, free_original=True)
    assert model[0]._pyquant.packed is model[1]._pyquant.packed
    assert list(done.replaced) == ["0", "1"]
    assert_same_bits(model.state_dict(), state)
    done.undo()
    assert_same_bits(model.state_dict(), state)


def test_hooks_of_hugging_face_accelerate() -> None:
    """`forward` is theirs and calls `_old_forward`."""
    layer = Linear4bit(SIZE, 32)
    seen: list[tuple[int, ...]] = []

    def hooked(module, x):
        seen.append(x.shape)
        return module._old_forward(x)

    layer._old_forward = layer.forward
    layer.forward = MethodType(hooked, layer)
    x = torch.randn(3, SIZE)
    expected = layer(x)
    done = accelerate(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert layer._old_forward.__func__ is not Linear4bit.forward
    assert len(seen) == 2
    done.undo()
    assert torch.equal(layer(x), expected)
    assert len(seen) == 3


def test_wrapped_after_acceleration() -> None:
    """A wrapper that still holds our method after undo() reaches the module's own."""
    layer = Linear4bit(SIZE, 32)
    x = torch.randn(3, SIZE)
    expected = layer(x)
    done = accelerate(layer)
    inner = layer.forward
    layer.forward = lambda x: inner(x) + 1
    done.undo()
    assert torch.equal(layer(x), expected + 1)


def of_package(module: str, name: str) -> nn.Module:
    return type(name, (nn.Module,), {"__module__": module})()


class Own(Linear4bit):
    __module__ = "bitsandbytes.nn.modules"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_reasons() -> None:
    """Each module that is kept says why; the others are replaced."""
    model = nn.ModuleDict({name: Linear4bit(SIZE, 32) for name in ("good", "fresh", "nan", "offloaded", "wrapped")})
    model["fresh"].weight.quant_state = None
    model["nan"].weight.quant_state.absmax[3] = torch.nan
    model["offloaded"]._hf_hook = type("Hook", (), {"offload": True})()
    model["wrapped"].forward = lambda x: x
    model["own"] = Own(SIZE, 32)
    model["int8"] = of_package("bitsandbytes.nn.modules", "Linear8bitLt")
    model["gptq"] = of_package("gptqmodel.nn_modules.qlinear.marlin", "MarlinQuantLinear")
    done = accelerate(model)
    assert list(done.replaced) == ["good"]
    for name, reason in {
        "fresh": "no quant_state",
        "nan": "load.bitsandbytes: nan.weight.absmax: expected finite values",
        "offloaded": "offloaded",
        "wrapped": "replaced by another library",
        "own": "Own has a forward of its own",
        "int8": "LLM.int8()",
        "gptq": "`pyquant convert` the checkpoint",
    }.items():
        assert reason in done.kept.pop(name)
    assert not done.kept
    with pytest.raises(ValueError, match=r"found no Linear4bit(?s:.)*good: accelerated already"):
        accelerate(model)


class Int4Tensor(torch.Tensor):
    """Stands for a tensor subclass, as torchao's."""


def test_reasons_of_layers_in_another_form() -> None:
    """They are quantized, and to be converted; quantize_model is not for them."""
    model = nn.ModuleDict({name: nn.Linear(SIZE, 32) for name in ("torchao", "compressed", "ours", "plain")})
    model["torchao"].weight = nn.Parameter(model["torchao"].weight.data.as_subclass(Int4Tensor))
    del model["compressed"].weight
    model["compressed"].register_buffer("weight_packed", torch.zeros(32, 8, dtype=torch.int32))
    pyquant.quantize_model(model, "nf4", include=["ours"])
    with pytest.raises(ValueError, match="found no Linear4bit") as caught:
        accelerate(model)
    reasons = dict(re.findall(r"^  (\w+): (.*)$", str(caught.value), flags=re.M))
    assert reasons["torchao"].startswith("its weight is a Int4Tensor; if that is of a quantized checkpoint")
    assert reasons["compressed"].startswith("it has no weight but bias, weight_packed; if that is of a quantized")
    assert reasons["ours"] == "it runs on pyquant's kernels already"
    assert reasons["plain"] == "not quantized; pyquant.quantize_model quantizes it"


def test_nothing_to_accelerate() -> None:
    with pytest.raises(ValueError, match=r"found no Linear4bit(?s:.)*\n  0: not quantized; pyquant.quant"):
        accelerate(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match="accelerate: compute_dtype: expected float32, float16 or bfloat16"):
        accelerate(Linear4bit(SIZE, 32), compute_dtype=torch.int8)


def test_an_error_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(stand_in)
    state, attributes = state_of(model), {name: set(model.get_submodule(name).__dict__) for name in NAMES}
    count = 0

    def failing(weight, device=None):
        nonlocal count
        count += 1
        if count == 5:
            raise torch.OutOfMemoryError("no memory")
        return pyquant.ops.pack(weight)

    monkeypatch.setattr(pyquant.QuantizedWeight, "pack", failing)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(model, free_original=True)
    assert count == 5
    assert_same_bits(model.state_dict(), state)
    assert {name: set(model.get_submodule(name).__dict__) for name in NAMES} == attributes


def test_stand_in_is_what_it_stands_for() -> None:
    """The same bytes and absmax as bitsandbytes' quantizer."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(96, SIZE)
    stored, state = quantize_4bit(w, "nf4", nested=False)
    theirs, their_state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    assert torch.equal(stored, theirs)
    assert torch.equal(state.absmax, their_state.absmax)


@pytest.mark.parametrize("freed", [False, True])
def test_peft(freed: bool) -> None:
    """LoRA on an accelerated model: gradients, compile, merge."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(real_linear4bit(SIZE, SIZE), nn.ReLU(), real_linear4bit(SIZE, SIZE, nested=True))
    model.is_loaded_in_4bit = True
    done = accelerate(model, free_original=freed)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2"], r=4, init_lora_weights=False))
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    assert sum(isinstance(m, LoraLinear4bit) for m in lora.modules()) == 2
    x = torch.randn(3, SIZE)
    trained = [p for p in lora.parameters() if p.requires_grad]
    y = lora(x)
    got = torch.autograd.grad(y.square().sum(), trained)
    assert len(got) == 4
    torch.testing.assert_close(torch.compile(lora, backend="aot_eager")(x), y)
    if freed:
        with pytest.raises(RuntimeError, match="restore_original"):
            lora.merge_adapter()
        done.restore_original()
    done.undo()
    expected = torch.autograd.grad(lora(x).square().sum(), trained)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    done = accelerate(lora)
    lora.merge_adapter()
    for module in lora.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    merged = lora(x)
    done.undo()
    torch.testing.assert_close(merged, lora(x), rtol=1e-4, atol=1e-4)
