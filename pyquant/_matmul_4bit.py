"""bitsandbytes' functions on 4-bit weights, with its signatures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ._packed_cache import CacheEntry, packed
from .formats import FORMATS
from .load import LoadError
from .ops import flip, gemm

_CODEBOOKS: dict[tuple[str, torch.device], torch.Tensor] = {}


def matmul_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    quant_state: Any,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ dequant(B)^T + bias``, as ``bitsandbytes.matmul_4bit``.

    The packed form of B is made in the first call and kept for as long as B's memory lives; ``B``, ``B.t()`` and
    ``B.data`` share it. In-place changes of B and of the quant state are noticed, but for those through ``.data``,
    which no version counter sees. The first call must not be part of a CUDA graph capture.

    Args:
        A: [..., K], fp32, fp16 or bf16.
        B: the 4-bit codes of a weight [N, K], bitsandbytes' bytes in any shape and any ``quant_storage`` dtype.
        quant_state: bitsandbytes' ``QuantState`` of B, NF4 or FP4, nested or not, or an object with its attributes.
        out: [..., N] in A's dtype, overwritten.
        bias: [N] in A's dtype.

    Returns:
        [..., N] in A's dtype, ``out`` if given. Gradients flow to A and bias; no dequantized weight is kept for them.

    Raises:
        ValueError: naming the part of B or of the quant state that does not fit, or a K that is not A's.
        RuntimeError: when A or bias do not fit the weight, as :func:`pyquant.linear`.

    Warns:
        DeprecationWarning: where the weight was quantized as [K, N], that is when A's last size is
            ``quant_state.shape[0]`` and not ``shape[1]``. The product is then ``A @ dequant(B)``.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state: expected the QuantState of B, got None")
    if quant_state.shape is None or len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: quant_state.shape: expected [N, K], got {quant_state.shape}")
    rows, columns = quant_state.shape
    size = A.shape[-1]
    if size not in (rows, columns):
        raise ValueError(f"matmul_4bit: A has K={size}, the weight has K={columns}")
    entry = _packed("matmul_4bit", B, quant_state)
    if size == columns:
        y = gemm(A, *entry.tensors, bias, *entry.integers)
    else:
        warnings.warn(
            f"matmul_4bit: the weight was quantized as [K, N] (quant_state.shape={[rows, columns]}); "
            "quantize it again as [N, K] (out_features, in_features)",
            DeprecationWarning,
            stacklevel=2,
        )
        y = gemm(A, *entry.tensors, bias, *flip(entry.integers))
    return y if out is None else _into("matmul_4bit", out, y)


def gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """``A @ dequant(B)^T + bias``, as ``torch.ops.bitsandbytes.gemm_4bit``; else as :func:`matmul_4bit`.

    Args:
        A: [..., K], fp32, fp16 or bf16.
        B: the 4-bit codes, in any shape and any ``quant_storage`` dtype.
        shapeB: [N, K].
        absmax: fp32 [blocks]; the second-level fp32 [ceil(blocks / 256)] where ``absmax_8bit`` is given.
        blocksize: of absmax.
        quant_type: "nf4" or "fp4".
        bias: [N] in A's dtype.
        absmax_8bit, absmax_code, absmax_offset: nested absmax: uint8 [blocks], fp32 [256], one fp32 value; all or none.

    Returns:
        [..., N] in A's dtype.

    Raises:
        ValueError: naming the part that does not fit.
    """
    nested = [absmax_8bit, absmax_code, absmax_offset]
    if any(part is None for part in nested) != all(part is None for part in nested):
        raise ValueError("gemm_4bit: expected all of absmax_8bit, absmax_code and absmax_offset, or none")
    state = SimpleNamespace(
        shape=tuple(shapeB), blocksize=blocksize, quant_type=quant_type, code=_codebook(quant_type, B.device),
        absmax=absmax if absmax_8bit is None else absmax_8bit, offset=absmax_offset, state2=None,
    )  # fmt: skip
    if absmax_8bit is not None:
        state.state2 = SimpleNamespace(absmax=absmax, code=absmax_code, blocksize=256)
    if len(state.shape) != 2 or A.shape[-1] != state.shape[1]:
        raise ValueError(f"gemm_4bit: shapeB: expected [N, {A.shape[-1]}], got {list(state.shape)}")
    entry = _packed("gemm_4bit", B, state)
    return gemm(A, *entry.tensors, bias, *entry.integers)


def gemv_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    out: torch.Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: Any = None,
) -> torch.Tensor:
    """``A @ dequant(B)^T``, as ``bitsandbytes.functional.gemv_4bit``; A may have any number of rows.

    Args:
        A: [..., K], fp32, fp16 or bf16.
        B, out, state: as ``B``, ``out`` and ``quant_state`` of :func:`matmul_4bit`.
        transposed_A, transposed_B: without effect, as in bitsandbytes.

    Returns:
        [..., N] in A's dtype, ``out`` if given.

    Raises:
        ValueError: naming the part that does not fit.
    """
    if state is None:
        raise ValueError("gemv_4bit: state: expected the QuantState of B, got None")
    entry = _packed("gemv_4bit", B, state)
    y = gemm(A, *entry.tensors, None, *entry.integers)
    return y if out is None else _into("gemv_4bit", out, y)


def _packed(function: str, B: torch.Tensor, quant_state: Any) -> CacheEntry:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # the cache is a matter of Python objects
    try:
        return packed(B, quant_state)
    except LoadError as error:
        raise ValueError(f"{function}: B, quant_state: {error}") from error


def _into(function: str, out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if out.shape != y.shape or out.dtype != y.dtype:
        raise ValueError(f"{function}: out: expected {y.dtype} {list(y.shape)}, got {out.dtype} {list(out.shape)}")
    return out.copy_(y)


def _codebook(quant_type: str, device: torch.device) -> torch.Tensor:
    """The format's codebook, one tensor for each device so that the cache knows it again."""
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"gemm_4bit: quant_type: expected 'nf4' or 'fp4', got {quant_type!r}")
    key = (quant_type, device)
    if key not in _CODEBOOKS:
        _CODEBOOKS[key] = torch.tensor(FORMATS[quant_type].codebook, device=device)
    return _CODEBOOKS[key]
