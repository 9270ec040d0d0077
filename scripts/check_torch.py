"""Checks that the built operators load and work under the torch that runs this script.

    python scripts/check_torch.py

Checks the pyquant that this Python imports: install one wheel (`make wheel`) beside each torch (2.11 or newer) to try.
Prints one line and exits with 1 if anything is wrong.
"""

from __future__ import annotations

import sys

import torch

import pyquant
from pyquant.formats import FORMATS
from pyquant.ops import op_arguments


def main() -> int:
    torch.manual_seed(0)
    worst = 0.0
    for name, fmt in FORMATS.items():
        codebook = torch.linspace(-1, 1, fmt.levels) if fmt.needs_codebook else None
        packed = pyquant.quantize(torch.randn(130, 200), name, codebook=codebook).pack()
        for tokens in (1, 70):
            x, bias = torch.randn(tokens, 200), torch.randn(130)
            ref = x.double() @ packed.unpack().dequantize().double().T + bias.double()
            y = pyquant.linear(x, packed, bias)
            worst = max(worst, float((y.double() - ref).norm() / ref.norm()))
        tensors, integers = op_arguments(packed)
        torch.library.opcheck(torch.ops.pyquant.gemm.default, (torch.randn(3, 200), *tensors, None, *integers))
    ok = worst <= 1e-6
    print(f"torch {torch.__version__}: {len(FORMATS)} formats, largest error {worst:.1e}: {'ok' if ok else 'FAILED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
