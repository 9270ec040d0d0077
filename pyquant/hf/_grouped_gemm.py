"""``torch.ops.pyquant.grouped_gemm``: the layers of all experts in one operator.

It hides from torch.compile how many rows each of them has, which depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..nn import QuantLinear, permute
from ..ops import flip, gemm, op_arguments

_Tensors = Sequence[torch.Tensor | None]
_PER_LAYER = 6  # the five tensors of a packed weight, and the permutation


def grouped_gemm(x: torch.Tensor, counts: torch.Tensor, layers: Sequence[QuantLinear]) -> torch.Tensor:
    """Rows of x, sorted by layer, each through its own.

    Args:
        x: [rows, K].
        counts: int64 [layers] on the CPU: how many rows each layer has. Rows behind those become zeros.
        layers: without biases, of one N and K.

    Returns:
        [rows, N] in x's dtype. Gradients flow to x.
    """
    tensors: list[torch.Tensor | None] = []
    integers: list[int] = []
    for layer in layers:
        own, numbers = op_arguments(layer.weight)
        tensors += [*own, layer.permutation]
        integers += numbers
    return torch.ops.pyquant.grouped_gemm(x, counts, tensors, integers)


# A loop over numbers on the CPU: what is captured in a CUDA graph would run for the first call's ever after.
@torch.library.custom_op("pyquant::grouped_gemm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(x: torch.Tensor, counts: torch.Tensor, tensors: _Tensors, integers: Sequence[int]) -> torch.Tensor:
    out = x.new_zeros(len(x), integers[1])
    start = 0
    for i, size in enumerate(counts.tolist()):
        if size:
            *weight, permutation = tensors[i * _PER_LAYER : (i + 1) * _PER_LAYER]
            rows = x[start : start + size]
            if permutation is not None:
                rows = permute(rows, permutation)
            out[start : start + size] = gemm(rows, *weight, None, *_integers_of(i, integers))
        start += size
    return out


@_forward.register_fake
def _(x: torch.Tensor, counts: torch.Tensor, tensors: _Tensors, integers: Sequence[int]) -> torch.Tensor:
    return x.new_empty(x.shape[0], integers[1])


@torch.library.custom_op("pyquant::grouped_gemm_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _backward(grad: torch.Tensor, counts: torch.Tensor, tensors: _Tensors, integers: Sequence[int]) -> torch.Tensor:
    grad_x = grad.new_zeros(len(grad), integers[2])
    start = 0
    for i, size in enumerate(counts.tolist()):
        if size:
            *weight, permutation = tensors[i * _PER_LAYER : (i + 1) * _PER_LAYER]
            part = gemm(grad[start : start + size], *weight, None, *flip(_integers_of(i, integers)))
            if permutation is None:
                grad_x[start : start + size] = part
            else:
                grad_x[start : start + size].index_copy_(1, permutation, part)
        start += size
    return grad_x


@_backward.register_fake
def _(grad: torch.Tensor, counts: torch.Tensor, tensors: _Tensors, integers: Sequence[int]) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], integers[2])


def _integers_of(layer: int, integers: Sequence[int]) -> tuple[int, int, int]:
    spec, n, k = integers[3 * layer : 3 * layer + 3]
    return spec, n, k


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, counts, tensors, integers = inputs
    ctx.save_for_backward(counts, *tensors)
    ctx.integers = integers


def _gradients(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    counts, *tensors = ctx.saved_tensors
    return torch.ops.pyquant.grouped_gemm_backward(grad, counts, tensors, ctx.integers), None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)
