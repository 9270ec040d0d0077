"""The commands of docs/architecture.md."""

from __future__ import annotations

import re
import subprocess
import sys

from docs_cases import ROOT, command_lines


def test_the_check_under_another_torch_runs_under_this_one() -> None:
    """The wheel is not built and the environment with another torch not made: minutes and gigabytes."""
    wheel, environment, check = command_lines("docs/architecture.md")
    make = subprocess.run([*wheel.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert make.returncode == 0, make.stderr
    assert "scripts/check_wheel.py" in make.stdout
    (version,) = re.findall(r'pip install "torch==([\d.]+)" dist/pyquant-\*\.whl$', environment)
    assert f'"torch>={version.removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()
    python, script = check.split()
    assert python == "torch211/bin/python"
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(": ok\n")
