"""Tensor parallelism and FSDP2 on two ranks: results and gradients are those of the whole model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from bitsandbytes_cases import Linear4bit
from conftest import VARIANTS, random_weight
from lora_cases import add_lora
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.debug import CommDebugMode

from pyquant import quantize_model
from pyquant.nn import QuantLinear
from pyquant.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

FORMATS = {"nf4": {"nested": True}, "uint4": {"group_size": 32}, "kbit3": {}, "int8": {}}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


def whole(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x.full_tensor() if isinstance(x, DTensor) else x


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Up to the order of fp32 sums."""
    a, b = a.detach(), b.detach()
    return float((a - b).norm()) <= 1e-5 * float(b.norm())


def check_tensor_parallel(mesh: DeviceMesh) -> None:
    for name, arguments in FORMATS.items():
        reference = quantize_model(MLP(), name, **arguments).to(mesh.device_type)
        model = parallelize_module(copy.deepcopy(reference), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        assert model.up.weight.shape == (128, 128)
        assert model.down.weight.shape == (128, 128)
        assert isinstance(model.up, QuantLinear)
        x = torch.randn(2, 5, 128, device=mesh.device_type)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = model(a), reference(b)
        assert same(y, expected), name
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected.backward(upstream)
        assert same(whole(a.grad), whole(b.grad)), name
        for layer in ("up", "down"):
            got, want = model.get_submodule(layer).bias.grad, reference.get_submodule(layer).bias.grad
            assert same(whole(got), whole(want)), (name, layer)
        with torch.no_grad():
            assert same(model(x), expected)


def check_layouts(mesh: DeviceMesh) -> None:
    """Sequence-parallel inputs and outputs; a bias is added once, DTensor outputs are left as they are."""
    reference = quantize_model(MLP(), "nf4").to(mesh.device_type)
    up = ColwiseParallel(input_layouts=Shard(1), use_local_output=False)
    down = RowwiseParallel(output_layouts=Shard(1))
    model = parallelize_module(copy.deepcopy(reference), mesh, {"up": up, "down": down})
    x = torch.randn(2, 6, 128, device=mesh.device_type)
    part = x.chunk(2, dim=1)[mesh.get_local_rank()]
    with CommDebugMode() as communication:
        y = model(part)
    assert same(y, reference(x).chunk(2, dim=1)[mesh.get_local_rank()])
    counts = {str(op).rpartition(".")[2]: n for op, n in communication.get_comm_counts().items()}
    assert counts == {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}
    model(part).sum().backward()
    reference(x).sum().backward()
    assert same(whole(model.down.bias.grad), whole(reference.down.bias.grad))
    assert same(whole(model.up.bias.grad), whole(reference.up.bias.grad))


def check_plain_linear(mesh: DeviceMesh) -> None:
    """One plan for a model of which some layers are not quantized."""
    reference = quantize_model(MLP(), "nf4", exclude=["up"]).to(mesh.device_type)
    model = parallelize_module(copy.deepcopy(reference), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    x = torch.randn(3, 128, device=mesh.device_type)
    assert same(model(x), reference(x))
    assert isinstance(model.up.weight, DTensor)


def check_act_order(mesh: DeviceMesh) -> None:
    weight = random_weight(VARIANTS[0], 64, 128)
    layer = QuantLinear.from_quantized(weight, None, torch.randperm(128, generator=torch.Generator().manual_seed(0)))
    layer.to(mesh.device_type)
    x = torch.randn(3, 128, device=mesh.device_type)
    expected = layer(x)
    with pytest.raises(ValueError, match=r"parallelize_module: QuantLinear: QuantLinear\(.*act-order with split K"):
        parallelize_module(layer, mesh, RowwiseParallel())
    assert torch.equal(layer(x), expected)
    parallelize_module(layer, mesh, ColwiseParallel(output_layouts=Replicate()))
    assert same(layer(x), expected)


def check_errors(mesh: DeviceMesh) -> None:
    def layer(n: int, k: int) -> QuantLinear:
        return QuantLinear.from_quantized(random_weight(VARIANTS[0], n, k), torch.ones(n)).to(mesh.device_type)

    for style, shape, message in [
        (ColwiseParallel(), (33, 128), r"QuantLinear\(.*33x128.*N=33 does not divide by world_size=2"),
        (RowwiseParallel(), (33, 127), r"K=127 does not divide by world_size=2"),
        (RowwiseParallel(), (32, 80), r"columns \d+ \.\. \d+ of K=80 .*nf4 expects groups of"),
    ]:
        module = layer(*shape)
        x = torch.randn(2, shape[1], device=mesh.device_type)
        before = module(x)
        for function in (parallelize_module, torch_parallel.parallelize_module):
            with pytest.raises(ValueError, match=message):
                function(module, mesh, style)
            assert torch.equal(module(x), before)
    for style in (ColwiseParallel(), RowwiseParallel()):
        with pytest.raises(
            ValueError, match=r"parallelize_module: Linear4bit: Linear4bit\(.*got packed bytes of bitsandbytes"
        ):
            parallelize_module(Linear4bit(64, 64).to(mesh.device_type), mesh, style)
    twice = parallelize_module(layer(64, 128), mesh, ColwiseParallel())
    with pytest.raises(ValueError, match="is parallel already"):
        parallelize_module(twice, mesh, ColwiseParallel())


def check_errors_name_the_path(mesh: DeviceMesh) -> None:
    """All layers are checked before the first is split; torch's function stops in between."""

    def make() -> nn.Module:
        blocks = nn.ModuleDict({"layers": nn.ModuleList([MLP(), MLP(), MLP()])})
        blocks["layers"][1].down = nn.Linear(256, 31)
        return quantize_model(blocks, "nf4").to(mesh.device_type)

    plan = {"layers.*.up": ColwiseParallel(), "layers.*.down": ColwiseParallel(), "norm": ColwiseParallel()}
    model = make()
    with pytest.raises(ValueError, match=r"^parallelize_module: layers\.1\.down: QuantLinear\(.*N=31 does not divide"):
        parallelize_module(model, mesh, plan)
    assert not any(m.is_parallel for m in model.modules() if isinstance(m, QuantLinear))
    with pytest.raises(ValueError, match=r"^parallelize_module: layers\.1\.down: QuantLinear\(.*N=31"):
        torch_parallel.parallelize_module(model, mesh, plan)
    assert model["layers"][0].up.is_parallel
    model = make()
    with pytest.raises(ValueError, match=r"^parallelize_module: layers\.0\.up: .*the plan names it twice"):
        parallelize_module(model, mesh, {"layers.*.up": ColwiseParallel(), "layers.0.up": ColwiseParallel()})
    del plan["layers.*.down"]
    with pytest.warns(UserWarning, match="'norm' could not be resolved") as caught:
        parallelize_module(model, mesh, plan)
    assert len(caught) == 1
    assert [block.up.is_parallel for block in model["layers"]] == [True] * 3
    with pytest.raises(RuntimeError, match=r"^up: gemm: x has K=127, the weight has K=128$"):
        model["layers"][0](torch.randn(2, 127, device=mesh.device_type))


def check_state_dict(mesh: DeviceMesh) -> None:
    """A rank's state dict is its part, and loads into the same part."""
    reference = quantize_model(MLP(), "nf4").to(mesh.device_type)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(copy.deepcopy(reference), mesh, plan)
    torch.manual_seed(1)
    other = parallelize_module(quantize_model(MLP(), "int8").to(mesh.device_type), mesh, dict(plan))
    other.load_state_dict(model.state_dict())
    x = torch.randn(3, 128, device=mesh.device_type)
    assert same(other(x), reference(x))


def check_source_rank(mesh: DeviceMesh) -> None:
    """Layers that differ: all get parts of rank 0's, as with torch's styles; with None each has a part of its own."""
    rank = mesh.get_local_rank()
    layers = [
        QuantLinear.from_quantized(random_weight(VARIANTS[0], 64, 128, seed=i), torch.ones(64) * i) for i in (0, 1)
    ]
    order = torch.randperm(128)
    layers += [QuantLinear.from_quantized(random_weight(VARIANTS[0], 64, 128), None, p) for p in (order, order.flip(0))]
    for first, second in (layers[:2], layers[2:]):
        first, second = first.to(mesh.device_type), second.to(mesh.device_type)
        mine = (first, second)[rank]
        x = torch.randn(3, 128, device=mesh.device_type)
        y = parallelize_module(copy.deepcopy(mine), mesh, ColwiseParallel())(x)
        assert same(y, first(x).chunk(2, dim=-1)[rank])
        own = parallelize_module(copy.deepcopy(mine), mesh, ColwiseParallel(), src_data_rank=None)(x)
        assert same(own, mine(x).chunk(2, dim=-1)[rank])
        assert not same(first(x), second(x))


def check_compiled(mesh: DeviceMesh) -> None:
    """The split model and its collectives in one graph, forward and backward."""
    reference = quantize_model(MLP(), "nf4").to(mesh.device_type)
    model = parallelize_module(copy.deepcopy(reference), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 128, device=mesh.device_type)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(a), reference(b)
    assert same(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert same(whole(a.grad), whole(b.grad))


CHECKS = [
    check_tensor_parallel,
    check_layouts,
    check_plain_linear,
    check_act_order,
    check_errors,
    check_errors_name_the_path,
    check_state_dict,
    check_source_rank,
    check_compiled,
]


def run_checks(mesh: DeviceMesh) -> None:
    for check in CHECKS:
        torch.manual_seed(0)
        check(mesh)


def test_two_ranks(tmp_path: Path) -> None:
    """All of CHECKS in one pair of processes: starting them takes longer than they do."""
    run_ranks(run_checks, tmp_path)


@pytest.mark.gpu
def test_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_ranks(run_checks, tmp_path, "cuda")


# ---- FSDP2


def train(model: nn.Module, batches: list[torch.Tensor], targets: list[torch.Tensor]) -> list[float]:
    """A few steps of AdamW on what trains, one batch each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for x, target in zip(batches, targets, strict=True):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_fsdp(mesh: DeviceMesh) -> None:
    """LoRA on sharded parameters learns what it learns in one process on both ranks' batches."""
    device = mesh.device_type
    reference = add_lora(nn.Sequential(*[quantize_model(MLP(), "nf4", nested=True) for _ in range(2)])).to(device)
    model = copy.deepcopy(reference)
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = [torch.randn(8, 128, device=device) for _ in range(5)]
    targets = [torch.randn(8, 128, device=device) for _ in range(5)]
    rank = mesh.get_local_rank()
    train(model, [x.chunk(2)[rank] for x in batches], [t.chunk(2)[rank] for t in targets])
    before = {name: p.detach().clone() for name, p in reference.named_parameters()}
    train(reference, batches, targets)
    sharded = dict(model.named_parameters())
    trained = 0
    for name, parameter in reference.named_parameters():
        assert isinstance(sharded[name], DTensor)
        assert sharded[name].to_local().numel() <= -(-parameter.numel() // 2)
        torch.testing.assert_close(whole(sharded[name]), parameter, rtol=1e-3, atol=1e-5)
        if parameter.requires_grad:
            assert not torch.allclose(parameter, before[name], rtol=0, atol=1e-3)
            trained += 1
    assert trained == 8
    for a, b in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(a, b)


def test_fsdp2_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(check_fsdp, tmp_path)


@pytest.mark.gpu
def test_fsdp2_on_two_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_ranks(check_fsdp, tmp_path, "cuda")
