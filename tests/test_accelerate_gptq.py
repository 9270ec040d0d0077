"""accelerate on GPTQ layers: gptqmodel's where it is installed, else stand-ins."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_cases import assert_same_bits, state_of
from conftest import assert_within_budget
from gptq_cases import (
    AWQuantLinear,
    MarlinLinear,
    QuantLinear,
    TorchLinear,
    TritonV2Linear,
    gptq_layer,
    gptqmodel_layer,
    write_gptq_llama,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pyquant
from pyquant import accelerate

FREED = ("qweight", "qzeros", "scales")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stand_in(*shape: int, **arguments: Any) -> Any:
    return gptq_layer(TorchLinear, *shape, **arguments)


def auto_gptq(*shape: int, **arguments: Any) -> Any:
    return gptq_layer(QuantLinear, *shape, **arguments)


each_source = pytest.mark.parametrize(
    "layer", [stand_in, auto_gptq, gptqmodel_layer], ids=["stand-in", "auto_gptq", "gptqmodel"]
)
each_order = pytest.mark.parametrize("act_order", [False, True], ids=["", "act-order"])


def model_of(layer: Any, act_order: bool = False) -> nn.Module:
    return nn.Sequential(
        layer(96, 64, act_order=act_order), nn.ReLU(), layer(64, 96, bias=False, symmetric=True), nn.Linear(64, 8)
    )


def exact(layer: Any) -> torch.Tensor:
    """The weight [N, K] in float64: the difference of integers is exact, and fp16 times it in float64 too."""
    twin = copy.deepcopy(layer)
    twin._buffers["scales"] = layer.scales.double()
    return twin.dequantize_weight().t()


@each_source
@each_order
def test_replaces_and_undoes(layer: Any, act_order: bool) -> None:
    model = model_of(layer, act_order)
    x = torch.randn(2, 5, 64)
    expected, classes, state = model(x), [type(m) for m in model], state_of(model)
    buffers, attributes = dict(model.named_buffers()), set(model[0].__dict__)
    done = accelerate(model)
    assert list(done.replaced) == ["0", "2"]
    assert "uint4" in done.replaced["0"]
    assert "int4" in done.replaced["2"]
    assert [type(m) for m in model] == classes
    assert all(buffers[name] is tensor for name, tensor in model.named_buffers())
    assert_same_bits(model.state_dict(), state)
    torch.testing.assert_close(model(x), expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match="layer of GPTQ or AWQ that could be replaced\n  0: accelerated already"):
        accelerate(model)
    done.undo()
    done.undo()
    assert torch.equal(model(x), expected)
    assert set(model[0].__dict__) == attributes
    assert not model[0]._state_dict_hooks
    assert not model[0]._load_state_dict_pre_hooks


@each_source
@each_order
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (3, False), (4, False), (4, True), (8, True)])
def test_runs_pyquants_kernel(
    layer: Any, act_order: bool, bits: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All widths, and the same bytes again after freeing."""
    module = layer(96, 64, bits=bits, symmetric=symmetric, act_order=act_order)
    weight, state = exact(module), state_of(module)
    done = accelerate(module, free_original=True)
    monkeypatch.setattr(type(module), "dequantize_weight", None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 64).to(dtype)
        y = module(x)
        assert y.dtype == dtype
        assert_within_budget(y, x, weight, module.bias.to(dtype))
    assert_same_bits(module.state_dict(), state)
    done.undo()
    assert_same_bits(dict(module.named_buffers(recurse=False)) | state, dict(module.named_buffers()))
    assert_same_bits(module.state_dict(), state)


@each_source
@each_order
def test_free_restore_move_and_load(layer: Any, act_order: bool) -> None:
    model = model_of(layer, act_order)
    other = state_of(model)
    for name in ("0.scales", "2.scales"):
        other[name] = other[name] * 2
    x = torch.randn(2, 64)
    expected, state = model(x), state_of(model)
    storages = [weakref.ref(getattr(model[0], name).untyped_storage()) for name in FREED]
    done = accelerate(model, free_original=True)
    assert [s() for s in storages] == [None, None, None]
    assert model[0].qweight.shape == (0, 96)
    with pytest.raises(RuntimeError, match="restore_original"):
        model[0].scales + 1
    got = model(x)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert_same_bits(model.state_dict(), state)
    assert model[0].qweight.numel() == 0, "state_dict leaves the bytes there"

    packed = model[0]._pyquant.packed
    weight = packed.weight
    model.to("cpu").eval()
    assert packed.weight is weight, "nothing moved, so nothing is packed again"
    assert packed.freed

    twin = copy.deepcopy(model)
    twin.load_state_dict(other)
    assert twin[0].qweight.numel() == 0
    assert_same_bits(twin.state_dict(), other)
    torch.testing.assert_close(twin[0](x) - twin[0].bias, 2 * (model[0](x) - model[0].bias), rtol=1e-3, atol=1e-3)
    assert torch.equal(model(x), got), "a copy is a model of its own"

    done.restore_original()
    assert_same_bits({name: getattr(model[0], name) for name in FREED}, {name: state["0." + name] for name in FREED})
    assert torch.equal(model(x), got)
    done.free_original()
    assert model[0].qweight.numel() == 0


@each_source
def test_changes_are_seen(layer: Any) -> None:
    module = layer(96, 64, act_order=True, bias=False)
    x = torch.randn(3, 64)
    accelerate(module)
    with torch.no_grad():
        module.qweight.bitwise_not_()
    assert_within_budget(module(x), x, exact(module))
    module.scales = module.scales * 2
    assert_within_budget(module(x), x, exact(module))
    module.g_idx = module.g_idx.flip(0)
    assert_within_budget(module(x), x, exact(module))
    module.bfloat16()
    assert module.scales.dtype == torch.bfloat16
    assert_within_budget(module(x), x, exact(module))


@each_source
@each_order
@pytest.mark.parametrize("freed", [False, True])
def test_gradients_and_compile(layer: Any, act_order: bool, freed: bool) -> None:
    """Once for all M >= 2, without a graph break."""
    module = layer(96, 64, act_order=act_order)
    weight = exact(module).float()
    accelerate(module, free_original=freed, compute_dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for m in (2, 3, 7):
        x = torch.randn(m, 64, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, module(x))
        upstream = torch.randn(m, 96)
        (gradient,) = torch.autograd.grad(y, x, upstream)
        torch.testing.assert_close(gradient, upstream @ weight, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@each_source
def test_export(layer: Any) -> None:
    module = layer(96, 64, act_order=True)
    accelerate(module)
    x = torch.randn(3, 64)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), module(x))


def test_kernels_with_a_forward_of_their_own() -> None:
    module = gptq_layer(TritonV2Linear, 96, 64)
    assert list(accelerate(module).replaced) == [""]


def test_version_2_is_told_by_the_kernel() -> None:
    """gptqmodel's marker says 1 for a checkpoint of version 2, whose zero points nothing is added to."""
    module = stand_in(96, 64, bias=False)
    assert module.qzero_format() == 1
    x = torch.eye(64).half()
    expected = module(x)
    accelerate(module)
    assert torch.equal(module(x), expected)


def test_the_old_cuda_kernel_knows_no_order() -> None:
    module = auto_gptq(96, 64, act_order=True, bias=False)
    module.QUANT_TYPE, module.reads_order = "cuda-old", False
    x = torch.randn(3, 64)
    weight = exact(module)
    accelerate(module)
    assert_within_budget(module(x), x, weight)


def test_what_is_kept() -> None:
    names = ("good", "planar", "rotated", "adapter", "meta", "nan", "rearranged", "wrapped", "order")
    model = nn.ModuleDict({name: stand_in(96, 64) for name in names})
    model["planar"].planar = True
    model["rotated"].online_full_had = True
    model["adapter"].adapter = object()
    model["meta"].to("meta")
    model["nan"].scales[0, 3] = torch.nan
    model["rearranged"].qweight = torch.zeros(96, 32, dtype=torch.uint8)
    model["wrapped"].forward = lambda x: x
    model["order"].g_idx = torch.zeros_like(model["order"].g_idx)
    model["marlin"] = gptq_layer(MarlinLinear, 96, 64)
    model["awq"] = gptq_layer(AWQuantLinear, 96, 64)
    model["exllama"] = auto_gptq(96, 64)
    model["exllama"].QUANT_TYPE = "exllama"
    model["largest"] = auto_gptq(96, 64)
    model["largest"].qzeros.fill_(-1)
    done = accelerate(model)
    assert list(done.replaced) == ["good"]
    for name, reason in {
        "planar": "planar layout (gptq_p)",
        "rotated": "it rotates its input",
        "adapter": "it has an adapter of gptqmodel",
        "meta": "it holds no weight yet",
        "nan": "load.gptq: nan.scales: expected finite values",
        "rearranged": "expected int32 words of 64 inputs with 4 bits, got torch.uint8 [96, 32]: padded, or rearranged",
        "wrapped": "its forward is replaced by another library",
        "order": "load.gptq: order.g_idx: expected 32 inputs in each of 2 groups",
        "marlin": 'quantization_config=GPTQConfig(bits=4, backend="gptq_torch")',
        "exllama": "its kernel rearranges its tensors",
        "awq": 'quantization_config=AwqConfig(bits=4, backend="torch_awq")',
        "largest": "largest.qzeros: a stored zero point is 15, which auto_gptq reads as 16 or as 0",
    }.items():
        assert reason in done.kept.pop(name)
    assert not done.kept


def test_an_error_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(stand_in)
    state, attributes = state_of(model), [set(m.__dict__) for m in model]
    pack, count = pyquant.QuantizedWeight.pack, 0

    def failing(weight: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise torch.OutOfMemoryError("no memory")
        return pack(weight, *arguments)

    monkeypatch.setattr(pyquant.QuantizedWeight, "pack", failing)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(model, free_original=True)
    assert count == 2
    assert_same_bits(model.state_dict(), state)
    assert [set(m.__dict__) for m in model] == attributes


@each_order
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("backend", ["gptq_torch", "gptq_torch_aten"])
def test_a_llama_loaded_by_transformers(tmp_path: Path, version: str, backend: str, act_order: bool) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    write_gptq_llama(tmp_path, version, act_order=act_order)
    settings = transformers.GPTQConfig(bits=4, backend=backend)

    def load() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float16, quantization_config=settings
        ).eval()

    model, tokens = load(), torch.arange(6)[None]
    state = state_of(model)
    done = accelerate(model, free_original=True)
    assert len(done.replaced) == 14
    assert list(done.kept) == ["lm_head"]
    assert_same_bits(model.state_dict(), state)
    with torch.no_grad():
        got = model(tokens).logits
        done.undo()
        expected = model(tokens).logits
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.005)
    if backend == "gptq_torch_aten":  # whose first pass has rearranged them
        with pytest.raises(ValueError, match=re.escape("accelerate before the first forward pass")):
            accelerate(model)


@pytest.mark.gpu
@each_source
@each_order
def test_on_the_gpu(layer: Any, act_order: bool) -> None:
    module = layer(96, 64, act_order=act_order)
    weight, state = exact(module), state_of(module)
    done = accelerate(module, free_original=True)
    module.to("cuda")
    assert module.qweight.is_cuda
    assert module.qweight.numel() == 0
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(3, 64, device="cuda").to(dtype)
        assert_within_budget(module(x), x, weight.cuda(), module.bias.to(dtype))
    done.undo()
    assert_same_bits(module.cpu().state_dict(), state)
