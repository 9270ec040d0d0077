"""The snippets of docs/accelerate.md run, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes_cases import Linear4bit
from docs_cases import blocks
from gptq_cases import write_gptq_llama
from torch import nn

import pyquant


def blocks_of_page() -> tuple[list[str], str]:
    """The snippets about one model, and the one that loads a model of GPTQ."""
    found = blocks("docs/accelerate.md", "python")
    (gptq,) = (block for block in found if "GPTQConfig" in block)
    found.remove(gptq)
    assert len(found) == 3
    return found, gptq


def test_snippets() -> None:
    snippets, _ = blocks_of_page()
    model = nn.Sequential(Linear4bit(64, 96), nn.ReLU(), nn.Linear(96, 8))
    x = torch.randn(3, 64)
    expected, own = model(x), model[0].weight.clone()
    names = {"model": model}
    exec(snippets[0], names)
    assert "1 modules replaced, 1 kept" in str(names["report"])
    assert model[0].weight.numel() == 0
    exec(snippets[1], names)
    assert torch.equal(model[0].weight, own)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    exec(snippets[2], names)
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
