"""``x @ W`` on a GPU: the fused kernels against dequantizing and torch's GEMM, by tokens.

    python scripts/transposed_times.py OUT.csv

Us of a call in a CUDA graph of calls on rotating weights, bf16. The fused kernel runs whatever the dispatch would do,
so that the table shows where the two cross.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pyquant import PackedWeight, _library, quantize
from pyquant.bench import device
from pyquant.bench.environment import read_environment
from pyquant.bench.graph_timing import cold_copies, time_graph
from pyquant.ops import flip, op_arguments

SHAPES = [(4096, 4096), (1024, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192)]
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 128, "scale_type": "bf16"},
    "nf4": {},
}
TOKENS = (1, 8, 16, 32, 64, 96, 128)
L2S = 8


def fused(weight: PackedWeight, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    tensors, integers = op_arguments(weight)
    return lambda x: torch.ops.pyquant.gemm_instance(x, *tensors, None, *flip(integers), index)


def measure(
    shapes: Sequence[tuple[int, int]], formats: Sequence[str], tokens: Sequence[int]
) -> list[dict[str, str | int | float]]:
    rows = []
    index_of = {row["name"]: i for i, row in enumerate(_library.instances())}
    for n, k in shapes:
        dense = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        for format in formats:
            packed = quantize(dense, format, **FORMATS[format]).pack()
            copies = [
                packed.map_tensors(torch.clone) for _ in range(cold_copies(packed.nbytes, L2S * device.l2_bytes()))
            ]
            index = index_of[f"cuda_transposed_{'codebook4' if packed.format.codebook else 'int4'}_bf16"]
            reference = packed.dequantize(torch.bfloat16)
            for m in tokens:
                x = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
                calls = {
                    "fused_us": [fused(w, index) for w in copies],
                    "dense_us": [lambda x, w=w: x @ w.dequantize(x.dtype) for w in copies],
                }
                expected = x @ reference
                row: dict[str, str | int | float] = {"n": n, "k": k, "format": format, "m": m}
                for column, functions in calls.items():
                    timing = time_graph(functions, x, 2 * m * k)
                    torch.testing.assert_close(
                        timing.outputs[-1], expected, rtol=0.05, atol=0.02 * float(expected.abs().max())
                    )
                    row[column] = round(timing.us, 3)
                print(row, flush=True)
                rows.append(row)
    return rows


def main(path: str) -> None:
    rows = measure(SHAPES, tuple(FORMATS), TOKENS)
    environment = {**asdict(read_environment()), "command": f"python scripts/transposed_times.py {path}"}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *environment])
        writer.writeheader()
        writer.writerows(row | environment for row in rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
