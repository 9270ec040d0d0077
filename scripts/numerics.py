"""Prints the tables of docs/numerics.md: what each format loses, and what the kernels add to it.

python scripts/numerics.py
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import pyquant
from pyquant.formats import FORMATS, ScaleType, ZeroType

N, K, M = 1024, 1024, 16


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def main() -> None:
    torch.manual_seed(0)
    w = torch.randn(N, K)
    x = torch.randn(M, K)
    # Lloyd-Max levels for normal weights over the absmax of 32 of them: a learned codebook.
    levels = torch.tensor([0.0499, 0.1509, 0.2551, 0.3652, 0.4846, 0.6179, 0.7739, 0.9686])
    learned = torch.cat([-levels.flip(0), levels])
    print("| format | scale | zero | group | bits per weight | SQNR, dB | fp32 | bf16 | bf16 base | fp16 | fp16 base |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for fmt in FORMATS.values():
        for scale in fmt.scale_types:
            for zero in fmt.zero_types:
                codebook = learned if fmt.needs_codebook else None
                q = pyquant.quantize(w, fmt.name, scale_type=scale, zero_type=zero, codebook=codebook)
                dense = q.dequantize()
                sqnr = -20 * math.log10(relative(dense, w))
                packed = q.pack()
                cells = [f"{relative(pyquant.linear(x, packed), x.double() @ dense.double().T):.1e}"]
                for dtype in (torch.bfloat16, torch.float16):
                    half = x.to(dtype)
                    ref = half.double() @ dense.double().T
                    ours = relative(pyquant.linear(half, packed), ref)
                    base = relative(F.linear(half, dense.to(dtype)), ref)
                    cells += [f"{ours:.2e}", f"{base:.2e}"]
                names = [
                    fmt.name,
                    ScaleType(scale).name.lower(),
                    "-" if zero is ZeroType.NONE else ZeroType(zero).name.lower(),
                ]
                row = [*names, str(q.group_size), f"{q.bits_per_weight:.3f}", f"{sqnr:.1f}", *cells]
                print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
