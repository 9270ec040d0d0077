"""The snippets of docs/transformers.md run, one after the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from docs_cases import snippets
from hf_cases import convert_layers, edit_config, save_dense
from test_hf_convert import BNB, bitsandbytes_layer, quantized_by_default
from torch import nn

from pyquant.nn import QuantLinear


def save_bitsandbytes(folder: Path) -> None:
    """A tiny Llama as transformers saves it with bitsandbytes."""
    save_dense(folder, "llama")
    layer = bitsandbytes_layer(nested=True)
    convert_layers(folder, quantized_by_default, lambda name, w: layer(name, w)[0])
    edit_config(folder, BNB)


def test_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = snippets("docs/transformers.md")
    assert [language for language, _ in blocks] == ["python", "python", "sh", "python", "python", "python"]
    save_dense(tmp_path / "llama", "llama")
    save_bitsandbytes(tmp_path / "llama-bnb-4bit")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    layers = []
    for language, block in blocks:
        if language == "sh":
            for line in block.splitlines():
                command = [sys.executable, "-m", *line.split()]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stderr
            continue
        exec(block, names)
        layers.append(sum(isinstance(m, QuantLinear) for m in names["model"].modules()))
    # Quantized, loaded, converted, quantized without the MLPs, dequantized.
    assert layers == [14, 14, 14, 8, 0]
    assert type(names["model"].model.layers[0].self_attn.q_proj) is nn.Linear


def test_without_the_import(tmp_path: Path) -> None:
    """What the page says of a process that does not import pyquant.hf."""
    save_bitsandbytes(tmp_path / "original")
    command = [sys.executable, "-m", "pyquant", "convert", "original", "converted"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    code = "import transformers; transformers.AutoModelForCausalLM.from_pretrained('converted')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Unknown quantization type, got pyquant" in done.stderr
