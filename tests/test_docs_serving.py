"""docs/serving.md, followed literally: its commands and its program, built and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from docs_cases import ROOT, blocks
from safetensors.torch import save_file

PAGE = "docs/serving.md"

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")


def shell(commands: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    script = "trap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n" + commands  # no server outlives a failure
    done = subprocess.run(
        ["bash", "-euc", script], cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_server(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_file({"a.weight": torch.randn(96, 128), "b.weight": torch.randn(64, 96)}, tmp_path / "model.safetensors")
    output = shell(blocks(PAGE, "sh")[0], tmp_path)
    assert "ready: 2 layers" in output


def test_a_program_of_your_own(tmp_path: Path) -> None:
    (cmake,), (program,), (_, commands) = blocks(PAGE, "cmake"), blocks(PAGE, "cpp"), blocks(PAGE, "sh")
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (tmp_path / "main.cpp").write_text(program)
    assert shell(commands, tmp_path).splitlines()[-1] == "32 16"
