"""Where a producer's package is installed: it still makes the golden files' tensors, and still reads them alike."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from load_cases import FOLDER
from safetensors.torch import load_file

# golden file: the package that makes it
PACKAGES = {
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed_tensors",
    "gpt_oss": "transformers",
    "gptq": "gptqmodel",
    "hqq": "hqq",
    "modelopt": "modelopt",
    "tinygemm": "torch",
    "torchao": "torchao",
}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Codes that are viewed as floats may be NaN."""
    x, y = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(x, y)


def test_every_golden_file_has_its_script() -> None:
    assert {f.stem for f in FOLDER.glob("*.safetensors")} == set(PACKAGES)
    assert {f.stem.removeprefix("make_") for f in FOLDER.glob("make_*.py")} == set(PACKAGES)


def test_the_pinned_versions_are_those_of_the_table() -> None:
    root = Path(__file__).parent.parent
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / ".ci" / "live.txt").read_text(), flags=re.M))
    table = dict(re.findall(r"\| ([\w-]+) (\d[\d.]+) \|$", (root / "docs" / "loading.md").read_text(), flags=re.M))
    checked = {name: version for name, version in table.items() if name != "transformers"}
    packages = {"bitsandbytes", "gptqmodel", "autoawq", "hqq", "compressed-tensors", "nvidia-modelopt", "torchao"}
    assert checked.keys() == packages
    assert {name: pinned.get(name) for name in checked} == checked


# torch packs tinygemm's layout on CUDA only.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu if name == "tinygemm" else ()) for name in PACKAGES]
)
def test_the_installed_package_makes_the_golden_file(tmp_path: Path, name: str) -> None:
    # `make live` has installed them all: there a missing one is a failure.
    if importlib.util.find_spec(PACKAGES[name]) is None and "PYQUANT_LIVE" not in os.environ:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    command = [sys.executable, str(FOLDER / f"make_{name}.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, stored = load_file(tmp_path / f"{name}.safetensors"), load_file(FOLDER / f"{name}.safetensors")
    assert made.keys() == stored.keys()
    assert [key for key in stored if not same_bytes(made[key], stored[key])] == []
