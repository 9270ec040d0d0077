"""Codes in rows of bytes: a little-endian bit stream along K, each row starting at a byte."""

from __future__ import annotations

import torch


def row_bytes(k: int, bits: int) -> int:
    """Bytes of a row of ``k`` codes."""
    return (k * bits + 7) // 8


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [N, K], each below 2^bits -> uint8 [N, ceil(K * bits / 8)], lowest k in the lowest bits."""
    if bits == 8:
        return codes.contiguous()
    n, k = codes.shape
    if bits in (2, 4):
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, -k % per_byte)).view(n, -1, per_byte)
        packed = padded[:, :, 0].clone()
        for i in range(1, per_byte):
            packed |= padded[:, :, i] << (bits * i)
        return packed
    # 3 and 5 bits: eight codes are `bits` whole bytes.
    padded = torch.nn.functional.pad(codes, (0, -k % 8)).view(n, -1, 8)
    packed = codes.new_zeros(n, padded.shape[1], bits)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        packed[:, :, byte] |= padded[:, :, i] << shift
        if shift + bits > 8:
            packed[:, :, byte + 1] |= padded[:, :, i] >> (8 - shift)
    return packed.view(n, -1)[:, : row_bytes(k, bits)].contiguous()


def unpack_codes(packed: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: uint8 [N, ceil(K * bits / 8)] -> uint8 codes [N, K]."""
    if bits == 8:
        return packed
    n = packed.shape[0]
    mask = (1 << bits) - 1
    if bits in (2, 4):
        parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).view(n, -1)[:, :k]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(n, -1, bits)
    codes = packed.new_empty(n, padded.shape[1], 8)
    for i in range(8):
        byte, shift = divmod(bits * i, 8)
        codes[:, :, i] = padded[:, :, byte] >> shift
        if shift + bits > 8:
            codes[:, :, i] |= padded[:, :, byte + 1] << (8 - shift)
    return (codes & mask).view(n, -1)[:, :k]
