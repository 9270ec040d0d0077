"""The two commands of docs/profiling.md, on the CPU; the page names the options and commands that there are."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from docs_cases import ROOT, blocks

from pyquant import _library
from pyquant.cli import main
from pyquant.profiler.measure import Profiler
from pyquant.tables import read_table

PAGE = "docs/profiling.md"
TEXT = (ROOT / PAGE).read_text()


def test_two_commands_make_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    pytest.importorskip("jsonschema")
    profile, build = (shlex.split(line, comments=True)[1:] for line in blocks(PAGE, "sh")[0].splitlines())
    assert (profile[0], build[:2]) == ("profile", ["table", "build"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Profiler, "cpu_seconds", 0.002)
    # As they stand but for the device, and a model and M that a CPU gets through.
    small = ["--device", "cpu", "--m", "1,4", "--hot", "--kernels", "*_portable"]
    model = profile.index("--model") + 1
    profile[model] = "llama-tiny"
    for command in ([*profile, *small], build):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
    made = read_table(tmp_path / build[build.index("-o") + 1])
    assert made.device == _library.device_name("cpu")
    assert {e.encoding for e in made.entries} == {"codebook4", "int4"}
    assert CliRunner().invoke(main, ["table", "check", "table.json", "profile.csv"]).exit_code == 0

    # What the page says of the result: a variable names it, and it chooses.
    code = (
        "import torch, pyquant; w = pyquant.quantize(torch.randn(128, 128), 'nf4').pack(); "
        "print(pyquant.explain(torch.randn(1, 128).bfloat16(), w).chosen_by)"
    )
    (setting,) = re.findall(r"`PYQUANT_TABLE=(\S+)`", TEXT)
    environment = os.environ | {"PYQUANT_TABLE": str(tmp_path / setting)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("table", 0), done.stderr


def test_the_example_is_a_table(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "table.json"
    (example,) = blocks(PAGE, "json")
    path.write_text(example)
    assert read_table(path).instances == ["cuda_dequant", "cuda_stream_int4_bf16", "cuda_wgmma_int4_bf16"]
    assert json.loads(example)["entries"][0]["buckets"][1]["m"] == [17, None]


def test_options_and_commands_are_those_that_exist() -> None:
    group = main.commands["table"]
    assert isinstance(group, click.Group)
    rows = re.findall(r"^\| `([a-z]+) ", TEXT, flags=re.M)
    assert sorted(rows) == sorted(group.commands)
    options = {name for p in main.commands["profile"].params for name in (*p.opts, *p.secondary_opts)}
    of_tables = {name for c in group.commands.values() for p in c.params for name in (*p.opts, *p.secondary_opts)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert len(named) > 20
    assert named <= options | of_tables
    assert options - named == {"--cold", "--graph", "--verify", "--csv"} - named, "each option is on the page"
