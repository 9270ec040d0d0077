"""The two commands of docs/profiling.md, and what it says of their result, on the CPU with one small shape."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "profiling.md").read_text()


def test_commands(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="needs pandas")
    (block,) = re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.S | re.M)
    profile, build = (line.split("#")[0].split()[1:] for line in block.splitlines())
    at = profile.index("--model")
    assert profile[at : at + 2] == ["--model", "llama-3.1-8b"]
    profile[at : at + 2] = ["--device", "cpu", "--n", "128", "--k", "128", "--m", "1", "--formats", "nf4"]
    for line in (profile, build):
        command = [sys.executable, "-m", "pyquant", *line]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    code = (
        "import torch, pyquant; w = pyquant.quantize(torch.randn(128, 128), 'nf4').pack(); "
        "print(pyquant.explain(torch.randn(1, 128).bfloat16(), w).by_table)"
    )
    (setting,) = re.findall(r"`PYQUANT_TABLE=(\S+)`", TEXT)
    environment = os.environ | {"PYQUANT_TABLE": str(tmp_path / setting)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr
