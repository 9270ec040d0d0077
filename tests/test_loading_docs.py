"""The snippets of docs/loading.md run as they stand, and its table names what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_convert import model_tensors, write_model

from pyquant import load

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "loading.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.S | re.M)
    assert found, f"no {language!r} block"
    return found


def test_python_block(tmp_path: Path) -> None:
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "QuantizedWeight(nf4, 2x64" in done.stdout


def test_command_lines(tmp_path: Path) -> None:
    write_model(tmp_path / "llama-bnb-4bit", "bitsandbytes", 2)
    save_file(model_tensors("bitsandbytes"), tmp_path / "model-nf4-bnb.safetensors")
    lines = [line.split()[1:] for block in blocks("sh") for line in block.splitlines()]
    assert [line[0] for line in lines] == ["convert", "convert", "info"]
    for line in lines:
        command = [sys.executable, "-m", "pyquant", *line]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "llama-pyquant" / "config.json").exists()


def test_every_loader_is_in_the_table() -> None:
    table = TEXT[TEXT.index("## What is exact") : TEXT.index("## What is refused")]
    loaders = {name for name in load.__all__ if name.islower() and name != "recognise"}
    assert loaders
    assert {name for name in loaders if f"`{name}`" not in table} == set()
