"""The README's snippets run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
PACKAGE = Path(__file__).resolve().parent.parent / "pyquant"


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.S | re.M)
    assert found, f"README has no {language!r} block"
    return found


def test_python_block() -> None:
    for block in blocks("python"):
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "QuantLinear" in done.stdout


def test_command_lines(tmp_path: Path) -> None:
    """Every `pyquant ...` line, on a small model in place of the reader's."""
    save_file({"layer.weight": torch.randn(128, 256), "layer.bias": torch.randn(128)}, tmp_path / "model.safetensors")
    lines = [line.split()[1:] for block in blocks("sh") for line in block.splitlines() if line.startswith("pyquant ")]
    assert [line[0] for line in lines] == ["quantize", "verify", "info", "bench"]
    for line in lines:
        if line[0] == "bench":
            line = ["bench", "--device", "cpu", "--shape", "128x256", "--m", "1", "--seconds", "0.05"]
        command = [sys.executable, "-m", "pyquant", *line]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_cpp_block_compiles(tmp_path: Path) -> None:
    source = tmp_path / "serve.cpp"
    source.write_text("\n".join(blocks("cpp")))
    command = ["c++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{PACKAGE / 'include'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
