"""Tensor parallelism: ``parallelize_module``, and styles for it that know ``QuantLinear``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from ._module_path import path_of, prefix_path
from ._narrow import check_shards
from .nn import QuantLinear, permute
from .ops import linear


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: torch_parallel.ParallelStyle | Mapping[str, torch_parallel.ParallelStyle] | None = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """``torch.distributed.tensor.parallel.parallelize_module``, which checks all quantized layers of the plan first.

    torch's function works too, but stops at the first layer that cannot be split, the ones before it split already.

    Raises:
        ValueError: naming the path of a quantized layer that cannot be split, and why. All ranks raise it, and nothing
            is changed.
    """
    found: list[tuple[nn.Module, int | None, int]] = []
    plan: Any = parallelize_plan
    if isinstance(plan, Mapping):
        plan = {path: _Probe(style, found) for path, style in plan.items()}
    elif plan is not None:
        plan = _Probe(plan, found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the call below says the same
        torch_parallel.parallelize_module(module, device_mesh, plan)
    paths = {m: path for path, m in module.named_modules()}
    seen: set[nn.Module] = set()
    for layer, dim, ranks in found:
        reason = None if dim is None else _reason_not_to(layer, dim, ranks)
        if isinstance(layer, QuantLinear) and layer in seen:
            reason = "the plan names it twice"
        if reason is not None:
            raise ValueError(f"parallelize_module: {paths[layer] or type(module).__name__}: {layer}: {reason}")
        seen.add(layer)
    return torch_parallel.parallelize_module(
        module,
        device_mesh,
        parallelize_plan,  # type: ignore[arg-type]
        src_data_rank=src_data_rank,
    )


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's ``ColwiseParallel``, also for :class:`pyquant.nn.QuantLinear`: each rank has N / ranks rows.

    Arguments and layouts are torch's: x replicated, y sharded on its last dimension unless told otherwise. Every rank
    has a whole layer before, of one format and shape, and its part of ``src_data_rank``'s layer after
    (``parallelize_module(..., src_data_rank=None)``: of its own). The bias becomes a ``DTensor``; the weight does not,
    and the ``state_dict`` of a rank holds its part.
    """

    dim = 0

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, self.dim, device_mesh)
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        _shard(module, device_mesh, self.dim, Shard(0), self.src_data_rank)
        module.__class__ = _ColwiseQuantLinear
        _add_hooks(module, device_mesh, self)
        return module


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's ``RowwiseParallel``, also for ``pyquant.nn.QuantLinear``: each rank has K / ranks columns.

    Arguments and layouts are torch's: x sharded on its last dimension, y replicated unless told otherwise. Partial
    sums, one of them with the bias, are added in x's dtype. Otherwise as :class:`ColwiseParallel`.
    """

    dim = 1

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check(module, self.dim, device_mesh)
        if not isinstance(module, QuantLinear):
            return super()._apply(module, device_mesh)
        _shard(module, device_mesh, self.dim, Replicate(), self.src_data_rank)
        module.__class__ = _RowwiseQuantLinear
        self.desired_input_layouts = (Shard(-1),)
        _add_hooks(module, device_mesh, self)
        return module


class _ColwiseQuantLinear(QuantLinear):
    is_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Each rank's gradient of x is the part that its rows give.
        assert isinstance(x, DTensor)  # the hook before made it one
        local = x.to_local(grad_placements=[Partial()])
        bias = self.bias.to_local().to(local.dtype) if isinstance(self.bias, DTensor) else None
        try:
            if self.permutation is not None:
                local = permute(local, self.permutation)
            y = linear(local, self.weight, bias)
        except RuntimeError as error:
            prefix_path(error, self)
            raise
        return DTensor.from_local(y, x.device_mesh, [Shard(-1)], run_check=False)


class _RowwiseQuantLinear(QuantLinear):
    is_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(x, DTensor)
        try:
            local = linear(x.to_local(), self.weight)
        except RuntimeError as error:
            prefix_path(error, self)
            raise
        y = DTensor.from_local(local, x.device_mesh, [Partial()], run_check=False)
        # Stays partial, so that the output's layout decides between all-reduce and reduce-scatter.
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Probe(torch_parallel.ParallelStyle):
    """Notes the modules that torch's function applies a style to: its dimension, or None, and the number of ranks."""

    def __init__(self, style: torch_parallel.ParallelStyle, found: list[tuple[nn.Module, int | None, int]]) -> None:
        super().__init__()
        self._dim: int | None = getattr(style, "dim", None) if isinstance(style, _OURS) else None
        self._found = found

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self._found.append((module, self._dim, device_mesh.size()))
        return module


_OURS = (ColwiseParallel, RowwiseParallel)


def _reason_not_to(module: nn.Module, dim: int, ranks: int) -> str | None:
    """Why a module cannot be split along N (``dim`` 0) or K (1), on any rank; None where it can."""
    if not isinstance(module, QuantLinear):
        # bitsandbytes' Linear4bit is an nn.Linear: torch's styles would split its bytes.
        if getattr(module._parameters.get("weight"), "quant_state", None) is None:
            return None
        return (
            "expected a QuantLinear or a module of torch, got packed bytes of bitsandbytes; "
            "read its checkpoint with pyquant.load and make a QuantLinear of each layer"
        )
    if module.is_parallel:
        return "is parallel already"
    if dim == 1 and module.permutation is not None:
        return (
            "act-order with split K: the permutation takes inputs from all ranks; "
            "use ColwiseParallel, or a checkpoint without desc_act"
        )
    try:
        check_shards(module.weight, dim, ranks)
    except ValueError as error:
        return str(error)
    return None


def _check(module: nn.Module, dim: int, mesh: DeviceMesh) -> None:
    # Before ranks talk to each other: none may wait for one that has raised.
    reason = _reason_not_to(module, dim, mesh.size())
    if reason is not None:
        raise ValueError(f"parallelize_module: {path_of(module)}: {module}: {reason}")


def _shard(module: QuantLinear, mesh: DeviceMesh, dim: int, bias: Placement, src_data_rank: int | None) -> None:
    whole = module.weight
    if src_data_rank is not None:
        whole = whole.map_tensors(torch.clone)  # the buffers may be someone else's too
        tensors = [*whole.tensors().values()]
        if module.permutation is not None:
            module.permutation = module.permutation.clone()
            tensors.append(module.permutation)
        for tensor in tensors:
            dist.broadcast(tensor, group=mesh.get_group(), group_src=src_data_rank)
    weight = whole.shard(dim, mesh.get_local_rank(), mesh.size())
    if module.bias is not None:
        part = distribute_tensor(module.bias, mesh, [bias], src_data_rank=src_data_rank)
        module.bias = nn.Parameter(part, requires_grad=module.bias.requires_grad)
    module._set_weight(weight)


def _add_hooks(module: nn.Module, mesh: DeviceMesh, style: Any) -> None:
    # What torch.distributed.tensor.distribute_module registers; that one would also make DTensors of the buffers, which
    # the kernels do not take.
    module.register_forward_pre_hook(
        lambda m, inputs: style._prepare_input_fn(style.input_layouts, style.desired_input_layouts, m, inputs, mesh)
    )
    module.register_forward_hook(
        lambda m, inputs, y: style._prepare_output_fn(style.output_layouts, style.use_local_output, m, y, mesh)
    )
