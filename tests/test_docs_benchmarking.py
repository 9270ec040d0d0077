"""The commands of docs/benchmarking.md, those for a GPU up to where they ask for it; its names are all there are."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from docs_cases import ROOT, assert_stops_for_a_gpu, command_lines, run_command

from pyquant.bench.environment import Environment
from pyquant.bench.model.decoding import MODES
from pyquant.bench.model.rows import ModelRow
from pyquant.bench.model.variants import NAMES
from pyquant.profiler.models import CONFIGS

TEXT = (ROOT / "docs" / "benchmarking.md").read_text()


def test_command_lines(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    own_report, chosen_report, from_csv, *models_on_a_gpu, model = command_lines("docs/benchmarking.md")
    (tmp_path / "profiles" / "h200").mkdir(parents=True)
    for name in ("prefill.csv", "decode.csv"):
        shutil.copy(ROOT / "profiles" / "h200" / name, tmp_path / "profiles" / "h200")
    for line in (from_csv, model):
        done = run_command(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert {"index.html", "rows.csv"} < {path.name for path in (tmp_path / "out").iterdir()}
    (tmp_path / "shapes.json").write_text('{"m": [1, 16], "models": {"name": [[64, 128]]}}')
    for line in (own_report, chosen_report):
        assert_stops_for_a_gpu(run_command(line, tmp_path), 2)
    assert len(models_on_a_gpu) == 2
    for line in models_on_a_gpu:
        assert_stops_for_a_gpu(run_command(line, tmp_path), 3)


def test_names_are_documented() -> None:
    own = {field.name for field in fields(ModelRow)} - {field.name for field in fields(Environment)}
    models = {name for name, config in CONFIGS.items() if config.gated}
    names = [*own, *models, *NAMES, *MODES["cuda"]]
    assert len(names) > 40
    assert [name for name in names if f"`{name}`" not in TEXT] == []
