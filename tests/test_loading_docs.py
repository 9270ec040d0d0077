"""The snippets of docs/loading.md run as they stand, and its table names what exists."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from docs_cases import ROOT, blocks, command_lines, run_command
from safetensors.torch import save_file
from test_convert import model_tensors, write_model

from pyquant import load

PAGE = "docs/loading.md"


def test_python_block(tmp_path: Path) -> None:
    for block in blocks(PAGE, "python"):
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "QuantizedWeight(nf4, 2x64" in done.stdout


def test_command_lines(tmp_path: Path) -> None:
    write_model(tmp_path / "llama-bnb-4bit", "bitsandbytes", 2)
    save_file(model_tensors("bitsandbytes"), tmp_path / "model-nf4-bnb.safetensors")
    lines = command_lines(PAGE)
    assert [line.split()[1] for line in lines] == ["convert", "convert", "info"]
    for line in lines:
        done = run_command(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "llama-pyquant" / "config.json").exists()


def test_every_loader_is_in_the_table() -> None:
    text = (ROOT / PAGE).read_text()
    table = text[text.index("## What is exact") : text.index("## What is refused")]
    loaders = {name for name in load.__all__ if name.islower() and name != "recognise"}
    assert loaders
    assert {name for name in loaders if f"`{name}`" not in table} == set()
