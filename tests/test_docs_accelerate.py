"""The snippets of docs/accelerate.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from bitsandbytes_cases import Linear4bit
from torch import nn

PAGE = Path(__file__).resolve().parent.parent / "docs" / "accelerate.md"


def test_snippets() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    assert len(blocks) == 3
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
