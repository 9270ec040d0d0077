"""The torch operators ``torch.ops.pyquant.*``: fake kernels, autograd, and the calls on weights."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._library import device_name, find_in_table, has_cuda, instances, load_torch_ops
from .formats import NESTED_MAP_SIZE, ScaleType, ZeroType
from .weight import PackedWeight, QuantizedWeight

load_torch_ops()

_GEMM = torch.ops.pyquant.gemm.default
# The same without the Python frame of OpOverload.__call__, 0.9 us of a call (Cascade Lake, torch 2.13, 2026-11-21).
_GEMM_EAGER = _GEMM._op

# What torch._C._AutoDispatchBelowAutograd does, without its object: 0.5 us of a call (Xeon, torch 2.13, 2026-11-21).
_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
_exclude = torch._C._dispatch_tls_set_dispatch_key_excluded
_is_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
# Under names of this module: each lookup in torch's is 20 ns of every call.
_is_compiling = torch.compiler.is_compiling
_is_inference_mode = torch.is_inference_mode_enabled
_is_grad_enabled = torch.is_grad_enabled

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # cx_dtype
_DTYPE_OF_ID = {i: dtype for dtype, i in _DTYPES.items()}


# Added to a gemm's spec: kProgrammaticLaunch and kTransposed of cutlass_ext/torch_ops.cpp.
_PDL = 1 << 62
_TRANSPOSED = 1 << 61


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """``x @ dequant(weight)^T + bias``, as ``torch.nn.functional.linear``; transposed ``x @ dequant(weight) + bias``.

    Args:
        x: [..., K], transposed [..., N]; fp32, fp16 or bf16, any strides.
        weight: [N, K], packed, on x's device.
        bias: [N], transposed [K], in x's dtype.
        transposed: multiply with the weight itself, as for the gradient with respect to the x of the other product.
            Few tokens and 4-bit codes in fp16 and bf16 on a GPU run a fused kernel; all else dequantizes the weight for
            torch's own GEMM (:func:`explain` says which).
        pdl: programmatic dependent launch (NVIDIA sm_90 and up, ignored elsewhere): the kernel may start, and read the
            weight, while the kernel before it on the stream still runs; x and y are touched after that one has ended.
            The weight must not be written by that kernel.

    Returns:
        [..., N], transposed [..., K], in x's dtype, accumulated in fp32. Gradients flow to x and bias.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    tensors, (spec, n, k) = op_arguments(weight)
    if transposed:
        spec += _TRANSPOSED
    return gemm(x, *tensors, bias, spec + _PDL if pdl else spec, n, k)


def gemm(*arguments: Any) -> torch.Tensor:
    """``torch.ops.pyquant.gemm`` by the shortest way.

    The operator's autograd wrapper is Python and costs more than 20 us a call; without gradients it is left out.

    Args:
        arguments: the operator's: x, the tensors of :func:`op_arguments`, bias or None, its integers. One tuple, since
            to take it apart and put it together again is 0.1 us of a call.
    """
    if _is_compiling():
        return _GEMM(*arguments)
    if _is_inference_mode():
        return _GEMM_EAGER(*arguments)
    if _is_grad_enabled():
        x, bias = arguments[0], arguments[6]
        if x.requires_grad or (bias is not None and bias.requires_grad):
            return _GEMM(*arguments)
    if _is_excluded(_AUTOGRAD):
        return _GEMM_EAGER(*arguments)
    try:
        _exclude(_AUTOGRAD, True)
        return _GEMM_EAGER(*arguments)
    finally:
        _exclude(_AUTOGRAD, False)


@dataclass(frozen=True)
class Explanation:
    """Which kernel a call runs, and who chose it."""

    instance: str  # a name of the instance list: <device>_<family>_<variant>
    dense: bool  # True: the instance dequantizes the weight into x's dtype, and torch's own GEMM follows
    chosen_by: str  # "table": measured on this device; "cost model": predicted from such times; "rule": of the dispatch

    def __str__(self) -> str:
        then = ", then torch.nn.functional.linear" if self.dense else ""
        return f"{self.instance}{then} (chosen by the {self.chosen_by})"


def explain(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, *, transposed: bool = False
) -> Explanation:
    """What ``linear(x, weight, bias, transposed=transposed)`` would run, without running it.

    Raises:
        RuntimeError: as :func:`linear` would.
    """
    tensors, integers = op_arguments(weight)
    if transposed:
        integers = flip(integers)
    row = instances()[torch.ops.pyquant.select_instance(x, *tensors, bias, *integers)]
    # The dispatch asks the table first. If what the table names is what runs, the table chose it; if not, then because
    # that instance does not take the problem. Transposed products are in no table.
    found = None if transposed else _table_choice(x, weight)
    # As select_instance: only calls on a GPU may end in a dense GEMM.
    if found is None or row["name"] != found["instance" if x.is_cuda else "gemm"]:
        chosen_by = "rule"
    else:
        chosen_by = "cost model" if found["predicted"] else "table"
    return Explanation(row["name"], not row["is_gemm"], chosen_by)


def _table_choice(x: torch.Tensor, weight: PackedWeight) -> dict[str, Any] | None:
    """What the tables say of this call on x's device; None: nothing."""
    from .tables.encoding import packed_encoding

    m = x.numel() // max(1, weight.k)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        device = device_name(x.device.type)
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
    key = (packed_encoding(weight), _DTYPES[x.dtype], weight.group_size, weight.n, weight.k)
    return find_in_table(device, *key, max(1, m), processors)


def scale_data_of(weight: QuantizedWeight) -> torch.Tensor | None:
    """What stands beside the scales, in one tensor: ``PackedWeight.scale_data``."""
    if weight.scale_type is ScaleType.NESTED:
        offset, map_, absmax = weight.nested_parts()
        return torch.cat([offset.view(1), map_, absmax])
    return None if weight.tensor_scale is None else weight.tensor_scale.view(-1)


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Canonical -> packed, lossless, on the weight's device."""
    w = weight
    scale_data = scale_data_of(w)
    codes, scales, zeros = _convert(torch.ops.pyquant.pack, w, scale_data)
    codebook = None if w.codebook is None else w.codebook.contiguous()
    return PackedWeight(
        w.format, w.n, w.k, w.group_size, w.scale_type, w.zero_type, codes, scales, zeros, codebook, scale_data
    )


def unpack(weight: PackedWeight) -> QuantizedWeight:
    """Packed -> canonical, the inverse of :func:`pack` bit for bit."""
    w = weight
    codes, scales, zeros = _convert(torch.ops.pyquant.unpack, w, w.scale_data)
    groups = (-1,) if w.flat_scales else (w.n, -1)
    parts = {}
    if w.scale_data is not None and w.scale_type is ScaleType.NESTED:
        offset, map_, absmax = w.scale_data.split([1, NESTED_MAP_SIZE, w.scale_data.numel() - 1 - NESTED_MAP_SIZE])
        parts = {"nested_offset": offset.view(()), "nested_map": map_, "nested_absmax": absmax}
    elif w.scale_data is not None:
        parts = {"tensor_scale": w.scale_data.view(())}
    return QuantizedWeight(
        w.format,
        w.n,
        w.k,
        w.group_size,
        w.scale_type,
        w.zero_type,
        codes.view(w.n, -1),
        scales.view(groups),
        None if zeros is None else zeros.view(groups),
        w.codebook,
        # Copies: the parts must not keep each other's memory alive, nor be saved as views of it.
        **{name: t.clone() for name, t in parts.items()},
    )


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [N, K] in ``dtype`` (fp32, fp16 or bf16): computed in fp32, rounded once."""
    if dtype not in _DTYPES:
        raise TypeError(f"dequantize: dtype: expected float32, float16 or bfloat16, got {dtype}")
    tensors, integers = op_arguments(weight)
    return torch.ops.pyquant.dequantize(*tensors, *integers, _DTYPES[dtype])


def dequantize_canonical(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The same for a canonical weight on a GPU."""
    w = weight
    tensors = (w.codes, w.scales, w.zeros, w.codebook, scale_data_of(w))
    contiguous = [None if t is None else t.contiguous() for t in tensors]
    return torch.ops.pyquant.dequantize_canonical(*contiguous, encode_spec(w), w.n, w.k, _DTYPES[dtype])


def dequantizes_canonical(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`dequantize_canonical` is there for a weight on ``device``."""
    return device.type == "cuda" and dtype in _DTYPES and has_cuda()


def op_arguments(weight: PackedWeight) -> tuple[tuple[torch.Tensor | None, ...], tuple[int, int, int]]:
    """The tensors and the integers (spec, N, K) of a packed weight, in the order of the operators' schemas."""
    w = weight
    return (w.codes, w.scales, w.zeros, w.codebook, w.scale_data), (encode_spec(w), w.n, w.k)


def flip(integers: tuple[int, int, int]) -> tuple[int, int, int]:
    """The integers of the product with the weight the other way round, transposed or not; without ``pdl``."""
    spec, n, k = integers
    return (spec ^ _TRANSPOSED) & ~_PDL, n, k


def encode_spec(weight: PackedWeight | QuantizedWeight) -> int:
    """Format, scale type, zero type and group size in one integer: an argument of a call costs about 0.5 us."""
    w = weight
    return make_spec(w.format.id, w.scale_type, w.zero_type, w.group_size)


def make_spec(format_id: int, scale_type: ScaleType, zero_type: ZeroType, group_size: int) -> int:
    """The integer of :func:`encode_spec`."""
    return format_id | int(scale_type) << 8 | int(zero_type) << 12 | group_size << 16


def _convert(
    op: Any, weight: PackedWeight | QuantizedWeight, scale_data: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    w = weight
    tensors = [None if t is None else t.contiguous() for t in (w.codes, w.scales, w.zeros, w.codebook, scale_data)]
    codes, scales, zeros = op(*tensors, encode_spec(w), w.n, w.k)
    return codes, scales, None if w.zeros is None else zeros


# Positions in the schemas: gemm(x, 5 weight tensors, bias, spec, n, k), gemm_instance(the same, instance),
# dequantize(5 weight tensors, spec, n, k, dtype).


@torch.library.register_fake("pyquant::gemm")
@torch.library.register_fake("pyquant::gemm_instance")
def _gemm_fake(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    spec, n, k = arguments[6:9]
    transposed = bool(spec & _TRANSPOSED)
    columns, result, letter = (n, k, "N") if transposed else (k, n, "K")
    torch._check(
        x.dim() >= 1 and x.shape[-1] == columns,
        lambda: f"gemm: x has shape {x.shape}, the weight has {letter}={columns}",
    )
    return x.new_empty((*x.shape[:-1], result))


@torch.library.register_fake("pyquant::dequantize")
@torch.library.register_fake("pyquant::dequantize_canonical")
def _dequantize_fake(*arguments: Any) -> torch.Tensor:
    n, k, dtype = arguments[6], arguments[7], arguments[8]
    return torch.empty(n, k, dtype=_DTYPE_OF_ID[dtype], device=arguments[0].device)


def _setup_context(ctx: Any, inputs: Sequence[Any], output: torch.Tensor) -> None:
    tensors = inputs[1:6]
    # The backward pass reads the packed weight: no dequantized copy is kept.
    ctx.save_for_backward(*tensors)
    ctx.integers = inputs[7:10]
    ctx.has_bias = inputs[6] is not None


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = gemm(grad, *ctx.saved_tensors, None, *flip(ctx.integers))
    if ctx.has_bias and ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (grad_x, *[None] * 5, grad_bias, *[None] * 3)


torch.library.register_autograd("pyquant::gemm", _backward, setup_context=_setup_context)
