"""The fenced snippets of README.md and docs/*.md, for the tests that run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def snippets(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page, such as ``docs/loading.md``, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.S | re.M)


def blocks(page: str, language: str) -> list[str]:
    """Those of one language."""
    found = [text for name, text in snippets(page) if name == language]
    assert found, f"{page} has no {language!r} block"
    return found


def command_lines(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines()]


def run_command(line: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """A command line that starts with ``pyquant``, and more arguments, where no GPU is seen."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "pyquant", line
    return subprocess.run(
        [sys.executable, "-m", "pyquant", *arguments, *more], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, timeout=300,
    )  # fmt: skip


def assert_stops_for_a_gpu(done: subprocess.CompletedProcess[str], code: int) -> None:
    """The command was understood, and ended where it asks for a GPU."""
    assert (done.returncode, "NVIDIA GPU" in done.stderr) == (code, True), done.stdout + done.stderr
