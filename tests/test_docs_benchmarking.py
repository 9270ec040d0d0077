"""The commands of docs/benchmarking.md that need no GPU run as they stand; the page names all columns and models."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pyquant.bench.environment import Environment
from pyquant.bench.model.decoding import MODES
from pyquant.bench.model.rows import ModelRow
from pyquant.bench.model.variants import NAMES
from pyquant.profiler.models import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "benchmarking.md").read_text()


def test_command_lines(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    lines = [line for block in re.findall(r"^```sh\n(.*?)^```", TEXT, flags=re.S | re.M) for line in block.splitlines()]
    assert len(lines) == 2
    (tmp_path / "profiles" / "h200").mkdir(parents=True)
    for name in ("prefill.csv", "decode.csv"):
        shutil.copy(ROOT / "profiles" / "h200" / name, tmp_path / "profiles" / "h200")
    for line in lines:
        command = [sys.executable, "-m", "pyquant", *line.split()[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert {"index.html", "rows.csv"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_names_are_documented() -> None:
    own = {field.name for field in fields(ModelRow)} - {field.name for field in fields(Environment)}
    models = {name for name, config in CONFIGS.items() if config.gated}
    names = [*own, *models, *NAMES, *MODES["cuda"]]
    assert len(names) > 40
    assert [name for name in names if f"`{name}`" not in TEXT] == []
