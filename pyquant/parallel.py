"""Tensor parallelism: styles for ``parallelize_module`` that know ``QuantLinear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from .nn import QuantLinear, permute
from .ops import linear


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's ``ColwiseParallel``, also for :class:`pyquant.nn.QuantLinear`: each rank has N / ranks rows.

    Arguments and layouts are torch's: x replicated, y sharded on its last dimension unless told otherwise. Every rank
    has a whole layer before, of one format and shape, and its part of ``src_data_rank``'s layer after
    (``parallelize_module(..., src_data_rank=None)``: of its own). The bias becomes a ``DTensor``; the weight does not,
    and the ``state_dict`` of a rank holds its part.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            _refuse_packed_bytes(module)
            return super()._apply(module, device_mesh)
        _shard(module, device_mesh, 0, Shard(0), self.src_data_rank)
        module.__class__ = _ColwiseQuantLinear
        _add_hooks(module, device_mesh, self)
        return module


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's ``RowwiseParallel``, also for ``pyquant.nn.QuantLinear``: each rank has K / ranks columns.

    Arguments and layouts are torch's: x sharded on its last dimension, y replicated unless told otherwise. Partial
    sums, one of them with the bias, are added in x's dtype. Otherwise as :class:`ColwiseParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantLinear):
            _refuse_packed_bytes(module)
            return super()._apply(module, device_mesh)
        if module.permutation is not None:
            raise ValueError(
                f"RowwiseParallel: {module}: act-order with split K: the permutation takes inputs from all ranks; "
                "use ColwiseParallel, or a checkpoint without desc_act"
            )
        _shard(module, device_mesh, 1, Replicate(), self.src_data_rank)
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
        if self.permutation is not None:
            local = permute(local, self.permutation)
        bias = self.bias.to_local().to(local.dtype) if isinstance(self.bias, DTensor) else None
        y = linear(local, self.weight, bias)
        return DTensor.from_local(y, x.device_mesh, [Shard(-1)], run_check=False)


class _RowwiseQuantLinear(QuantLinear):
    is_parallel = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(x, DTensor)
        local = linear(x.to_local(), self.weight)
        y = DTensor.from_local(local, x.device_mesh, [Partial()], run_check=False)
        # Stays partial, so that the output's layout decides between all-reduce and reduce-scatter.
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _refuse_packed_bytes(module: nn.Module) -> None:
    # bitsandbytes' Linear4bit is an nn.Linear: torch's styles would split its bytes.
    if getattr(module._parameters.get("weight"), "quant_state", None) is not None:
        raise ValueError(
            f"parallelize_module: {module}: expected a QuantLinear or a module of torch, got packed bytes of "
            "bitsandbytes; read its checkpoint with pyquant.load and make a QuantLinear of each layer"
        )


def _shard(module: QuantLinear, mesh: DeviceMesh, dim: int, bias: Placement, src_data_rank: int | None) -> None:
    if module.is_parallel:
        raise ValueError(f"parallelize_module: {module} is parallel already")
    whole = module.weight
    if src_data_rank is not None:
        whole = whole.map_tensors(torch.clone)  # the buffers may be someone else's too
        tensors = [*whole.tensors().values()]
        if module.permutation is not None:
            module.permutation = module.permutation.clone()
            tensors.append(module.permutation)
        for tensor in tensors:
            dist.broadcast(tensor, group=mesh.get_group(), group_src=src_data_rank)
    try:
        weight = whole.shard(dim, mesh.get_local_rank(), mesh.size())
    except ValueError as error:
        raise ValueError(f"parallelize_module: {module}: {error}") from error
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
