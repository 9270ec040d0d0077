"""What is measured: one GEMM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# As the command line and the CSV files write them.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Problem:
    """One GEMM: y[M, N] = x[M, K] @ W[N, K]^T."""

    m: int
    n: int
    k: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k
