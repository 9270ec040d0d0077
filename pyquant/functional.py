"""Functions under the names that users of bitsandbytes and torchao know."""

from __future__ import annotations

import torch

from ._matmul_4bit import gemm_4bit, gemv_4bit, matmul_4bit
from .codes import pack_codes, unpack_codes
from .formats import FORMATS, Format, ScaleType, ZeroType
from .quantize import quantize
from .scales import decode_absmax_e4m4, encode_absmax_e4m4
from .weight import QuantizedWeight

__all__ = [
    "create_normal_float_codebook",
    "decode_absmax_e4m4",
    "dequantize_kbit",
    "encode_absmax_e4m4",
    "gemm_4bit",
    "gemv_4bit",
    "matmul_4bit",
    "pack_2xint4",
    "quantize_kbit",
]

KBIT_BLOCKSIZE = 32


def create_normal_float_codebook(k: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The 2^k fp32 values of bitsandbytes' k-bit normal float, sorted, largest magnitude 1; k in 2..5."""
    return torch.tensor(_kbit_format(k, "create_normal_float_codebook").codebook, device=device)


def quantize_kbit(
    A: torch.Tensor, k: int = 4, codebook: torch.Tensor | None = None, absmax_format: str = "e4m4"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize to k bits in blocks of 32 over the flattened tensor, in bitsandbytes' bit planes.

    Args:
        A: any shape, fp32, fp16 or bf16.
        k: bits, 2..5.
        codebook: [2^k] values in units of absmax; None for the normal float codebook.
        absmax_format: "e4m4" (uint8) or "fp32".

    Returns:
        packed: int32 [blocks * k]; bit i of word ``block * k + j`` is bit j of the code of element ``32 * block + i``.
        absmax: uint8 or fp32 [blocks].
        codebook: fp32 [2^k].
    """
    fmt = _kbit_format(k, "quantize_kbit")
    if absmax_format not in ("e4m4", "fp32"):
        raise ValueError(f"quantize_kbit: absmax_format: expected 'e4m4' or 'fp32', got {absmax_format!r}")
    if A.numel() == 0:
        raise ValueError("quantize_kbit: A: expected at least one element, got none")
    flat = torch.nn.functional.pad(A.reshape(1, -1), (0, -A.numel() % KBIT_BLOCKSIZE))
    weight = quantize(flat, fmt.name, scale_type=ScaleType[absmax_format.upper()], codebook=codebook)
    codes = unpack_codes(weight.codes, weight.k, k).view(-1, KBIT_BLOCKSIZE)
    bits = torch.arange(KBIT_BLOCKSIZE, device=A.device)
    planes = [((codes >> j & 1).long() << bits).sum(dim=1) for j in range(k)]
    # Bit 31 is the sign of an int32.
    packed = torch.stack(planes, dim=1).view(-1).to(torch.int32)
    return packed, weight.scales.view(-1), weight.values()


def dequantize_kbit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    codebook: torch.Tensor,
    k: int,
    n: int,
    dtype: torch.dtype = torch.float16,
) -> torch.Tensor:
    """The inverse of :func:`quantize_kbit`.

    Args:
        packed: int32 [blocks * k], more words than needed are allowed (bitsandbytes pads).
        absmax: uint8 (E4M4) or fp32 [blocks], more values than needed are allowed.
        codebook: fp32 [2^k].
        k: bits, 2..5.
        n: number of elements.
        dtype: of the result.

    Returns:
        [n] in ``dtype``: ``codebook[code] * absmax`` in fp32, rounded once.
    """
    fmt = _kbit_format(k, "dequantize_kbit")
    blocks = -(-n // KBIT_BLOCKSIZE)
    if n < 1 or packed.numel() < blocks * k or absmax.numel() < blocks:
        raise ValueError(
            f"dequantize_kbit: n={n}, k={k}: expected packed [{blocks * k}] and absmax [{blocks}], "
            f"got [{packed.numel()}] and [{absmax.numel()}]"
        )
    if packed.dtype != torch.int32 or absmax.dtype not in (torch.uint8, torch.float32):
        raise TypeError(
            f"dequantize_kbit: expected int32 packed and uint8 or float32 absmax, got {packed.dtype} and {absmax.dtype}"
        )
    if codebook.shape != (fmt.levels,):
        raise ValueError(f"dequantize_kbit: codebook: expected [{fmt.levels}], got {list(codebook.shape)}")
    bits = torch.arange(KBIT_BLOCKSIZE, device=packed.device, dtype=torch.int32)
    planes = packed[: blocks * k].view(blocks, k, 1) >> bits & 1
    codes = torch.stack([planes[:, j] << j for j in range(k)]).sum(dim=0).to(torch.uint8)
    scale_type = ScaleType.E4M4 if absmax.dtype == torch.uint8 else ScaleType.FP32
    length = blocks * KBIT_BLOCKSIZE
    weight = QuantizedWeight(
        fmt,
        1,
        length,
        KBIT_BLOCKSIZE,
        scale_type,
        ZeroType.NONE,
        pack_codes(codes.view(1, -1), k),
        absmax[:blocks].view(1, -1),
        codebook=codebook.float(),
    )
    return weight.dequantize(dtype).view(-1)[:n]


def pack_2xint4(t: torch.Tensor) -> torch.Tensor:
    """int8 or uint8 [R, C], R even -> [R / 2, C]: row 2i in the low nibble, row 2i + 1 in the high one (torchao)."""
    if t.dim() != 2 or t.shape[0] % 2 != 0 or t.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"pack_2xint4: t: expected int8 or uint8 [R, C] with even R, got {t.dtype} {list(t.shape)}")
    return (t[::2] & 0xF) | (t[1::2] << 4)


def _kbit_format(k: int, function: str) -> Format:
    name = f"kbit{k}"
    if name not in FORMATS:
        raise ValueError(f"{function}: k: expected 2, 3, 4 or 5, got {k}")
    return FORMATS[name]
