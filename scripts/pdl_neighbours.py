"""What programmatic dependent launch is worth when another library's kernel stands between two GEMMs.

    python scripts/pdl_neighbours.py OUT.csv

For each shape and M: us of a pair (an RMS norm of torch over [M, K], then pyquant.linear on its result) in a CUDA graph
of pairs on rotating weights, with plain and with dependent launches of the GEMM. The norm has no trigger, so the GEMM's
early part overlaps nothing but its end.
"""

from __future__ import annotations

import csv
import sys

import torch
import torch.nn.functional as F

from pyquant import linear, quantize
from pyquant.bench import device
from pyquant.bench.graph_timing import cold_copies, time_graph

SHAPES = [(4096, 4096), (6144, 4096), (8192, 8192), (28672, 4096), (4096, 14336)]
L2S = 8


def main(path: str) -> None:
    rows = []
    for n, k in SHAPES:
        packed = quantize(torch.randn(n, k, device="cuda", dtype=torch.bfloat16), "int4", 64).pack()
        copies = [packed.map_tensors(torch.clone) for _ in range(cold_copies(packed.nbytes, L2S * device.l2_bytes()))]
        gain = torch.randn(k, device="cuda", dtype=torch.bfloat16)
        for m in (1, 16):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

            def norm(value: torch.Tensor, gain: torch.Tensor = gain) -> torch.Tensor:
                return F.rms_norm(value, gain.shape, gain)

            def pairs(pdl: bool) -> list:
                return [lambda value, w=w: linear(norm(value), w, pdl=pdl) for w in copies]  # noqa: B023

            figures = {
                "norm_us": time_graph([norm] * len(copies), x, 2 * m * k),
                "pair_us": time_graph(pairs(False), x, 2 * m * n),
                "pair_pdl_us": time_graph(pairs(True), x, 2 * m * n),
            }
            row = {"n": n, "k": k, "m": m, **{name: round(t.us, 3) for name, t in figures.items()}}
            row["pdl_cost"] = round(row["pair_pdl_us"] / row["pair_us"] - 1, 4)
            print(row, flush=True)
            rows.append(row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
