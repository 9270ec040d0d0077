"""Programs of users under mypy --strict, which finds the package as an installed one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = [ROOT / "tests" / "data" / "typing" / name for name in ("user.py", "user_hf.py")]


def test_users_programs_are_clean_under_strict() -> None:
    """From PYTHONPATH mypy takes only packages with py.typed; the programs' own ignores show that it saw the types."""
    for package in ("mypy", "transformers", "peft"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "user"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Not in the root, which mypy would take for the program's own sources.
    done = subprocess.run(
        [*command, *map(str, PROGRAMS)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=PROGRAMS[0].parent,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"no issues found in {len(PROGRAMS)} source files" in done.stdout
