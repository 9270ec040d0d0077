"""The snippets of docs/accelerate.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_cases import Linear4bit
from gptq_cases import write_gptq_llama
from torch import nn

import pyquant

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accelerate.md"


def blocks_of_page() -> tuple[list[str], str]:
    """The snippets about one model, and the one that loads a model of GPTQ."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    (gptq,) = (block for block in blocks if "GPTQConfig" in block)
    blocks.remove(gptq)
    assert len(blocks) == 3
    return blocks, gptq


def test_snippets() -> None:
    blocks, _ = blocks_of_page()
    model = nn.Sequential(Linear4bit(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(3, 64)
    expected, own = model(x), model[0].weight.clone()
    names = {"model": model}
    exec(blocks[0], names)
    assert "1 modules replaced, 1 kept" in str(names["report"])
    assert model[0].weight.numel() == 0
    exec(blocks[1], names)
    assert torch.equal(model[0].weight, own)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    exec(blocks[2], names)
    assert torch.equal(model(x), expected)


def test_a_gptq_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "gptqmodel", "optimum"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    write_gptq_llama(tmp_path / "llama-gptq", "gptq")
    names: dict[str, Any] = {"pyquant": pyquant}
    exec(blocks_of_page()[1], names)
    assert len(names["report"].replaced) == 14
    assert names["gptq_model"].model.layers[0].mlp.up_proj.qweight.numel() == 0
