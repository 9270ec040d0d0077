"""The commands of docs/performance.md: as they stand where no GPU is needed, else up to where they ask for one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_cases import ROOT, assert_stops_for_a_gpu, blocks, run_command

from pyquant import _library

CPU, H200, TABLE, MODEL, GPU = (block.splitlines() for block in blocks("docs/performance.md", "sh"))
SMALL = ["--shape", "64x128", "--seconds", "0.05", "--threads", "1"]


@pytest.mark.parametrize("line", CPU, ids=["threads", "one thread"])
def test_on_the_cpu_with_less_work(line: str, tmp_path: Path) -> None:
    """The last of a repeated option counts, but for --m."""
    done = run_command(line, tmp_path, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("64 x 128") == line.count("--m ")


def test_the_measurements_of_the_h200_stop_for_a_gpu() -> None:
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-euc", H200[0]], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "scripts/gpu: expected CUDA in the libraries and a GPU" in done.stderr


def test_plots_and_reports_of_measured_rows(tmp_path: Path) -> None:
    for package in ("pandas", "matplotlib", "plotly"):
        pytest.importorskip(package)
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    for line in H200[1:]:
        done = run_command(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "decode.png").stat().st_size > 0
    assert (tmp_path / "out" / "index.html").stat().st_size > 0


def test_the_table_from_the_rows_that_were_measured(tmp_path: Path) -> None:
    for package in ("pandas", "jsonschema", "scipy"):
        pytest.importorskip(package)
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    profile, build, score = TABLE
    assert_stops_for_a_gpu(run_command(profile, tmp_path), 3)
    shutil.copy(ROOT / "profiles" / "h200" / "profile.csv", tmp_path)
    for line in (build, score):
        done = run_command(line, tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "table.json").read_text())["device"] == "NVIDIA H200"


def test_whole_models_stop_for_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "SITE").mkdir()
    (tmp_path / "VLLM_C").symlink_to(_library.LIBRARY)  # --load-library loads it
    (line,) = MODEL
    assert_stops_for_a_gpu(run_command(line, tmp_path), 3)


def test_measuring_stops_for_a_gpu_where_an_option_needs_one(tmp_path: Path) -> None:
    """Where there is none, commands without an option for GPUs measure on the CPU."""
    plain, of_gpus, shapes, *more_of_gpus, from_csv = GPU
    (tmp_path / "shapes.json").write_text('{"m": [1, 16], "models": {"name": [[64, 128]]}}')
    for line, more in ((plain, SMALL), (shapes, SMALL[2:])):
        done = run_command(line, tmp_path, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(more_of_gpus) == 2
    for line in (of_gpus, *more_of_gpus):
        assert_stops_for_a_gpu(run_command(line, tmp_path), 2)
    pytest.importorskip("matplotlib")
    shutil.copy(ROOT / "profiles" / "h200" / "decode.csv", tmp_path / "gpu.csv")
    assert run_command(from_csv, tmp_path).returncode == 0
    assert (tmp_path / "gpu.svg").stat().st_size > 0
