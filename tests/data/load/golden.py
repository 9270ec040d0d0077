"""Shared by the ``make_*.py`` scripts: a golden file is the producer's tensors and its own dequantization.

``<case>.<tensor>`` is what a checkpoint holds for the layer ``<case>``; ``expected.<case>.<dtype>`` is the producer's
dequantized weight in that dtype. The header says which versions made it, and ``cases`` holds each case's settings.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# Where files go: beside this script, or the folder given on the command line.
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent


def write(name: str, tensors: dict[str, torch.Tensor], cases: dict[str, dict[str, Any]], *packages: str) -> None:
    """Write ``<name>.safetensors``."""
    versions = {package: version(package) for package in ("torch", *packages)}
    metadata = {"versions": json.dumps(versions), "cases": json.dumps(cases)}
    path = FOLDER / f"{name}.safetensors"
    save_file({key: t.contiguous().clone() for key, t in tensors.items()}, path, metadata)
    print(f"{path.name}: {path.stat().st_size} bytes, {len(cases)} cases, {versions}")
