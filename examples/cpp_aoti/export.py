"""Quantizes a model and compiles it ahead of time: writes a package that main.cpp runs without Python.

python export.py model.pt2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import pyquant


def make_model() -> nn.Module:
    """Two linear layers, [..., 256] -> [..., 256], in nested NF4."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    return pyquant.quantize_model(model, "nf4", nested=True)


def export(path: Path, device: str) -> None:
    """A package for any number of rows of x from 1 to 4096."""
    model = make_model().to(device)
    rows = torch.export.Dim("rows", min=1, max=4096)
    x = torch.randn(8, 256, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path, help="file to write, .pt2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    export(arguments.package, arguments.device)
    print(f"{arguments.package}: {arguments.package.stat().st_size} bytes")
