"""The torch operators ``torch.ops.pyquant.*``: fake kernels, autograd, and the calls on weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ._library import load_torch_ops
from .weight import PackedWeight, QuantizedWeight

load_torch_ops()

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # cx_dtype
_DTYPE_OF_ID = {i: dtype for dtype, i in _DTYPES.items()}


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ dequant(weight)^T + bias``, as ``torch.nn.functional.linear``.

    Args:
        x: [..., K], fp32, fp16 or bf16, any strides.
        weight: [N, K], packed, on x's device.
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype, accumulated in fp32. Gradients flow to x and bias.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    tensors, spec = op_arguments(weight)
    return torch.ops.pyquant.gemm(x, *tensors, bias, *spec)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Canonical -> packed, lossless, on the weight's device."""
    return _convert(torch.ops.pyquant.pack, weight, PackedWeight)


def unpack(weight: PackedWeight) -> QuantizedWeight:
    """Packed -> canonical, the inverse of :func:`pack` bit for bit."""
    flat = _convert(torch.ops.pyquant.unpack, weight, QuantizedWeight)
    groups = (-1,) if weight.flat_scales else (weight.n, -1)
    shapes = {"codes": (weight.n, -1), "scales": groups, "zeros": groups}
    parts = {name: t.view(shapes[name]) for name, t in flat.tensors().items() if name in shapes}
    return _replace(flat, QuantizedWeight, parts)


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K] in ``dtype`` (fp32, fp16 or bf16): computed in fp32, rounded once."""
    if dtype not in _DTYPES:
        raise TypeError(f"dequantize: dtype: expected float32, float16 or bfloat16, got {dtype}")
    tensors, spec = op_arguments(weight)
    return torch.ops.pyquant.dequantize(*tensors, *spec, _DTYPES[dtype])


def op_arguments(
    weight: PackedWeight | QuantizedWeight,
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, ...]]:
    """The tensors and the integers of a weight, in the order of the operators' schemas."""
    w = weight
    tensors = (
        w.codes,
        w.scales,
        w.zeros,
        w.codebook,
        w.nested_map,
        w.nested_absmax,
        w.nested_offset,
        w.tensor_scale,
    )
    return tensors, (w.format.id, int(w.scale_type), int(w.zero_type), w.group_size, w.n, w.k)


def _convert(op: Any, weight: PackedWeight | QuantizedWeight, to: type) -> Any:
    tensors, spec = op_arguments(weight)
    codes, scales, zeros = op(*[None if t is None else t.contiguous() for t in tensors], *spec)
    parts = {"codes": codes, "scales": scales}
    if weight.zeros is not None:
        parts["zeros"] = zeros
    return _replace(weight, to, parts)


def _replace(weight: PackedWeight | QuantizedWeight, to: type, parts: dict[str, torch.Tensor]) -> Any:
    """A weight of type ``to`` with ``parts`` instead of the tensors of those names."""
    w = weight
    tensors = {**w.tensors(), **parts}
    return to(w.format, w.n, w.k, w.group_size, w.scale_type, w.zero_type, **tensors)


# The operators' schemas: gemm(x, 8 weight tensors, bias, format, scale_type, zero_type, group_size, n, k, instance),
# dequantize(8 weight tensors, 6 integers, dtype).


@torch.library.register_fake("pyquant::gemm")
def _gemm_fake(x: torch.Tensor, *arguments: Any, instance: int = -1) -> torch.Tensor:
    n, k = arguments[13], arguments[14]
    torch._check(x.dim() >= 1 and x.shape[-1] == k, lambda: f"gemm: x has shape {x.shape}, the weight has K={k}")
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("pyquant::dequantize")
def _dequantize_fake(*arguments: Any) -> torch.Tensor:
    n, k, dtype = arguments[12], arguments[13], arguments[14]
    return torch.empty(n, k, dtype=_DTYPE_OF_ID[dtype], device=arguments[0].device)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
    x, *tensors = inputs[:9]
    # The backward pass reads the packed weight: no dequantized copy is kept.
    ctx.save_for_backward(*tensors)
    ctx.spec = inputs[10:16]
    ctx.x_shape = x.shape
    ctx.has_bias = inputs[9] is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.pyquant.dequantize(*ctx.saved_tensors, *ctx.spec, _DTYPES[grad.dtype])
        grad_x = grad.matmul(weight)
    if ctx.has_bias and ctx.needs_input_grad[9]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, *[None] * 8, grad_bias, *[None] * 7)


torch.library.register_autograd("pyquant::gemm", _backward, setup_context=_setup_context)
