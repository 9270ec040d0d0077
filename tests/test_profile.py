"""``pyquant profile`` on the CPU, for real: what is measured, kept, resumed and refused; and from rows to a table."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result

import pyquant
from pyquant import _library
from pyquant.bench.format_spec import FormatSpec
from pyquant.cli import main
from pyquant.cli.params import IntRanges
from pyquant.profiler import measure as profiler_measure
from pyquant.profiler.measure import Profiler
from pyquant.profiler.models import CONFIGS
from pyquant.profiler.plan import Case, Setting, cases, instances_of
from pyquant.profiler.rows import COLUMNS, open_profile

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--n", 64, "--k", 128, "--m", "1,2", "--formats", "nf4", "--hot")
PORTABLE = ("--kernels", "*_portable")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profiler, "cpu_seconds", 0.002)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["profile", "--device", "cpu", *map(str, arguments)])


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


# ---- options


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1", (1,)),
        ("1,16:128:16", (1, *range(16, 129, 16))),
        ("4:6", (4, 5, 6)),
        ("8, 1:9:4,1", (1, 5, 8, 9)),
        ("5:5", (5,)),
        ("1:10:4", (1, 5, 9)),
    ],
)
def test_ranges(text: str, values: tuple[int, ...]) -> None:
    assert IntRanges().convert(text, None, None) == values


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "1:", ":3", "5:4", "1:2:0", "1:2:3:4", "1,,2", "1.5"])
def test_wrong_ranges(text: str) -> None:
    with pytest.raises(click.UsageError, match="expected positive integers or start:end:step"):
        IntRanges().convert(text, None, None)


def test_globs_match_with_and_without_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [row["name"] for row in _library.instances() if row["device"] == "cpu" and row["available"]]
    assert [name for _, name, _ in instances_of("cpu", ["cpu_stream_*"])] == [n for n in every if "_stream_" in n]
    assert [name for _, name, _ in instances_of("cpu", ["tile_*"])] == [n for n in every if "_tile_" in n]
    assert instances_of("cpu", ["cuda_*"]) == []
    tables = [{"name": f"cuda_{n}_bf16", "device": "cuda", "available": True, "is_gemm": True,
               "is_transposed": False} for n in
              ("stream_int4", "wgmma_codebook4", "wgmma_int4")]  # fmt: skip
    monkeypatch.setattr(_library, "instances", lambda: tables)
    for glob, numbers in {"wgmma_*nf4*": [1], "*_uint4_*": [0, 2], "*codebook4*": [1], "*int8*": [], "*mxfp4_bf16": [1],
                          "*int4*": [0, 2], "cuda_wgmma_nf4_bf16": [1]}.items():  # fmt: skip
        assert [i for i, _, _ in instances_of("cuda", [glob])] == numbers, glob


def test_of_instances_that_dequantize_there_is_one() -> None:
    every = [row["name"] for row in _library.instances() if row["device"] == "cpu" and row["available"]]
    dense = [name for _, name, is_gemm in instances_of("cpu", []) if not is_gemm]
    assert dense == [next(n for n in every if "_dequant_" in n)], "the one that a call takes"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "which weights?"),
        (("--n", 64), "--n and --k need each other"),
        ((*TINY, "--append"), "--append needs --csv"),
        ((*TINY, "--formats", "int9"), "expected one of nf4"),
        (("--model", "gpt-5"), "gpt-2"),
    ],
)
def test_wrong_usage(arguments: tuple[object, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(main, ["profile", *map(str, TINY)])
    assert result.exit_code == 3
    assert "no NVIDIA GPU" in result.output
    assert "--device cpu" in result.output


def test_nothing_matched() -> None:
    result = run(*TINY, "--kernels", "wgmma_*")
    assert result.exit_code == 1
    assert "no instance matches --kernels; those that run on cpu here: cpu_" in result.output


def test_models_are_the_shapes_of_their_layers() -> None:
    assert set(CONFIGS["llama-3.1-8b"].shapes()) == {
        (4096, 4096), (1024, 4096), (6144, 4096), (14336, 4096), (28672, 4096), (4096, 14336)
    }  # fmt: skip
    assert set(CONFIGS["gpt-2"].shapes()) == {(768, 768), (2304, 768), (3072, 768), (768, 3072)}


# ---- measuring


def test_every_case_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    result = run(*TINY, *PORTABLE, "--formats", "int4-g128", "--bias", "--csv", path)
    assert result.exit_code == 0, result.output
    frame = read(path)
    assert list(frame.columns) == COLUMNS
    expected = {
        (m, fmt, name)
        for m in ("1", "2")
        for fmt in ("nf4", "int4-g128")
        for name in ("cpu_stream_portable", "cpu_tile_portable")
    }
    assert set(frame[["m", "format", "instance"]].itertuples(index=False, name=None)) == expected
    assert set(frame["disposition"]) == {"passed"}
    assert set(frame["gpu"]) == {_library.device_name("cpu")}
    assert set(frame["bias"]) == {"True"}
    us = frame[["us_p10", "us", "us_p90"]].astype(float)
    assert (us > 0).all(axis=None)
    assert (us["us_p10"] <= us["us"]).all()
    assert (us["us"] <= us["us_p90"]).all()
    assert "fastest instances" in result.output
    assert "8 passed" in result.output


def test_the_command_of_a_row_measures_it_again(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    assert run(*TINY, "--m", 2, "--bias", "--no-verify", "--kernels", "tile_portable", "--csv", first).exit_code == 0
    command = read(first)["command"][0]
    again = CliRunner().invoke(main, [*shlex.split(command)[1:], "--csv", str(second)])
    assert again.exit_code == 0, again.output
    same = ["m", "n", "k", "format", "group_size", "dtype", "bias", "cache", "launch", "instance", "disposition"]
    assert read(first)[same].equals(read(second)[same])
    assert read(second)["command"][0] == command


def test_cold_weights_are_several_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler_measure, "COLD_BYTES", 20_000)
    path = tmp_path / "p.csv"
    arguments = ("--n", 64, "--k", 128, "--m", 1, "--formats", "nf4", "--kernels", "tile_portable", "--csv", path)
    assert run(*arguments, "--cold").exit_code == 0
    assert int(read(path)["copies"][0]) == 5  # of 4608 bytes


def test_formats_group_sizes_and_nested(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    arguments = ("--n", 64, "--k", 256, "--m", 1, "--hot", "--kernels", "tile_portable", "--csv", path)
    result = run(*arguments, "--formats", "nf4,int4-g64,int4", "--group-size", "32,128", "--nested")
    assert result.exit_code == 0, result.output
    expected = ["nf4-g32-nested", "nf4-g128-nested", "int4-g64", "int4-g32", "int4-g128"]
    assert list(read(path)["format"]) == expected


def test_a_wrong_result_is_incorrect_and_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = profiler_measure._call_of

    def wrong(case: Case, bias: torch.Tensor | None) -> Any:
        call = right(case, bias)
        return lambda weight, x: call(weight, x) + (0.5 if "tile" in case.instance else 0)

    monkeypatch.setattr(profiler_measure, "_call_of", wrong)
    path = tmp_path / "p.csv"
    result = run(*TINY, *PORTABLE, "--csv", path)
    assert result.exit_code == 1
    assert "incorrect: relative error" in result.output
    frame = read(path)
    assert set(zip(frame["instance"], frame["disposition"], strict=True)) == {
        ("cpu_stream_portable", "passed"),
        ("cpu_tile_portable", "incorrect"),
    }
    unverified = run(*TINY, *PORTABLE, "--no-verify", "--csv", tmp_path / "q.csv")
    assert unverified.exit_code == 0
    assert set(read(tmp_path / "q.csv")["disposition"]) == {"not verified"}


@pytest.mark.parametrize(
    ("message", "disposition", "code"),
    [
        ("gemm: instance: cpu_tile_portable does not cover this weight", "not supported", 0),
        ("gemm: something broke", "failed", 1),
    ],
)
def test_what_does_not_run_has_a_row_with_the_reason(
    message: str, disposition: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = profiler_measure._call_of

    def refuse(case: Case, bias: torch.Tensor | None) -> Any:
        def call(weight: Any, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(message)

        return call if "tile" in case.instance else right(case, bias)

    monkeypatch.setattr(profiler_measure, "_call_of", refuse)
    path = tmp_path / "p.csv"
    assert run(*TINY, *PORTABLE, "--csv", path).exit_code == code
    frame = read(path)
    bad = frame[frame["instance"] == "cpu_tile_portable"]
    assert set(bad["disposition"]) == {disposition}
    assert set(bad["reason"]) == {message}
    assert set(bad["us"]) == {""}
    alone = run(*TINY, "--kernels", "tile_portable")
    assert alone.exit_code == 1, "nothing ran at all"


def test_a_broken_device_leaves_a_row_and_is_gone_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = profiler_measure._call_of

    def refuse(case: Case, bias: torch.Tensor | None) -> Any:
        def call(weight: Any, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("an illegal memory access was encountered\nmore")

        return call if "stream" in case.instance and case.m == 1 else right(case, bias)

    path = tmp_path / "p.csv"
    with monkeypatch.context() as patch:
        patch.setattr(profiler_measure, "_call_of", refuse)
        patch.setattr(Profiler, "_device_error", lambda self: "it does not answer")
        broken = run(*TINY, *PORTABLE, "--csv", path)
    assert broken.exit_code == 1
    assert "cpu_stream_portable: an illegal memory access was encountered; after it the GPU reports: it does" in (
        broken.output
    )
    assert list(read(path)[["instance", "m", "disposition"]].itertuples(index=False, name=None)) == [
        ("cpu_stream_portable", "1", "failed")
    ]
    rest = run(*TINY, *PORTABLE, "--csv", path, "--append")
    assert rest.exit_code == 0, rest.output
    assert list(read(path)["disposition"]) == ["failed", "passed", "passed", "passed"]


def test_tokens_of_a_file_of_shapes(tmp_path: Path) -> None:
    shapes, path = tmp_path / "shapes.json", tmp_path / "p.csv"
    shapes.write_text('{"m": [3, 5], "models": {"a": [[64, 128]]}}')
    options = ("--shapes", shapes, "--formats", "nf4", "--hot", "--kernels", "tile_portable")
    assert run(*options, "--csv", path).exit_code == 0
    assert list(read(path)["m"]) == ["3", "5"]
    assert run(*options, "--m", 2, "--csv", tmp_path / "q.csv").exit_code == 0
    assert list(read(tmp_path / "q.csv")["m"]) == ["2"]


def test_a_shape_that_the_format_does_not_allow_is_not_supported() -> None:
    profiler = Profiler(Setting("cpu", "fp32", cache="hot", launch="host"))
    odd = cases(
        [(8, 100)], [FormatSpec("nvfp4"), FormatSpec("nf4", None, True)], [1], instances_of("cpu", ["tile_portable"])
    )
    dispositions = {row.format: row.disposition for row in profiler.measure(odd)}
    assert set(dispositions) == {"nvfp4", "nf4-nested"}
    assert "failed" not in dispositions.values()


# ---- budget, interruption, resumption


def test_budget_stops_and_append_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    arguments = (*TINY, *PORTABLE, "--m", "1:6", "--csv", path)
    first = run(*arguments, "--budget", 1e-9)
    assert first.exit_code == 0
    assert "the budget of 1e-09 s is spent: 0 of 12 cases were measured" in first.output
    assert run(*TINY, *PORTABLE, "--m", "1:2", "--csv", path).exit_code == 0
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert "is there already" in refused.output
    before = read(path)
    with path.open("a") as file:
        file.write("3,64,128,nf4")  # what a killed process leaves
    rest = run(*arguments, "--append")
    assert rest.exit_code == 0, rest.output
    assert "8 passed" in rest.output
    frame = read(path)
    assert frame.iloc[: len(before)].equals(before)
    assert sorted(frame["m"]) == sorted([str(m) for m in range(1, 7)] * 2)
    assert "nothing left to measure" in run(*arguments, "--append").output


def test_append_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("a,b\n1,2\n")
    other = run(*TINY, *PORTABLE, "--csv", path, "--append")
    assert other.exit_code == 1
    assert "expected the columns of `pyquant profile`" in other.output
    path.unlink()
    assert run(*TINY, *PORTABLE, "--csv", path).exit_code == 0
    path.write_text(path.read_text().replace(_library.device_name("cpu"), "Other CPU"))
    device = run(*TINY, *PORTABLE, "--csv", path, "--append")
    assert device.exit_code == 1
    assert "got Other CPU" in device.output


def test_an_interruption_keeps_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    command = [sys.executable, "-m", "pyquant", "profile", "--device", "cpu", "--csv", str(path), "--m", "1:1000"]
    command += [*map(str, PORTABLE), "--n", "64", "--k", "128", "--formats", "nf4", "--hot"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell without job control starts what runs in the background with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while (not path.exists() or len(path.read_text().splitlines()) < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    second = run(*TINY, *PORTABLE, "--csv", path, "--append")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert second.exit_code == 1
    assert f"{path}: in use by process {process.pid} on " in second.output
    assert process.returncode == 130, errors
    assert "interrupted: " in errors
    frame = read(path)
    assert len(frame) >= 2
    assert set(frame["disposition"]) == {"passed"}
    assert run(*TINY, *PORTABLE, "--csv", path, "--append").exit_code == 0, "the lock is free again"


def test_the_lock_is_released(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    with open_profile(path, "GPU"), pytest.raises(BlockingIOError, match=rf"in use by process {os.getpid()} on"):
        open_profile(path, "GPU").__enter__()
    with open_profile(path, "GPU") as file:
        assert file.done == set()


# ---- from rows to what a call runs


def test_profile_build_load(tmp_path: Path) -> None:
    """The two commands for a device of one's own, and a call that follows the table."""
    csv, path = tmp_path / "p.csv", tmp_path / "table.json"
    arguments = ("--n", 64, "--k", 128, "--m", "1,32", "--formats", "nf4", "--dtype", "fp32", "--hot", "--csv", csv)
    assert run(*arguments, "--kernels", "tile_portable").exit_code == 0
    frame = read(csv)
    slow = frame.assign(instance="cpu_stream_portable", us="1000000")
    pd.concat([frame, slow]).to_csv(csv, index=False)
    built = CliRunner().invoke(main, ["table", "build", str(csv), "-o", str(path)])
    assert built.exit_code == 0, built.output
    assert json.loads(path.read_text())["processors"] == torch.get_num_threads()
    weight = pyquant.quantize(torch.randn(64, 128), "nf4").pack()
    x = torch.randn(1, 128)
    before = pyquant.explain(x, weight).instance
    assert before != "cpu_tile_portable"
    try:
        pyquant.load_table(path)
        assert pyquant.explain(x, weight).instance == "cpu_tile_portable"
        said = CliRunner().invoke(
            main, ["table", "explain", "--m", "1", "--n", "64", "--k", "128", "--dtype", "fp32", "--format", "nf4"]
        )
        assert said.output.splitlines()[0] == "cpu_tile_portable" or torch.cuda.is_available()
    finally:
        pyquant.load_table(None)
    assert pyquant.explain(x, weight).instance == before


@pytest.mark.gpu
@pytest.mark.parametrize("launch", ["--graph", "--stream"])
def test_profile_build_load_on_a_gpu(launch: str, tmp_path: Path) -> None:
    csv, path = tmp_path / "p.csv", tmp_path / "table.json"
    arguments = ["profile", "--n", "512", "--k", "512", "--m", "1,64", "--formats", "int4-g128", "--bias", launch]
    result = CliRunner().invoke(main, [*arguments, "--csv", str(csv)])
    assert result.exit_code == 0, result.output
    frame = read(csv)
    assert len(frame) == 2 * len(instances_of("cuda", []))
    assert set(frame["disposition"]) == {"passed", "not supported"}
    ran = frame[frame["disposition"] == "passed"]
    assert {"cuda_stream_int4_bf16", "cuda_dequant"} <= set(ran["instance"])
    columns = ["us", "floor_us", "floor_fraction", "ratio_to_cublas", "processors"]
    assert (ran[columns].astype(float) > 0).all(axis=None)
    pytest.importorskip("jsonschema")
    built = CliRunner().invoke(main, ["table", "build", str(csv), "-o", str(path)])
    assert built.exit_code == 0, built.output
    # A choice that the rule would not make: dequantize at M = 1.
    content = json.loads(path.read_text())
    assert content["device"] == torch.cuda.get_device_name()
    content["entries"][0]["buckets"] = [{"m": [1, None], "instance": "cuda_dequant", "gemm": "cuda_simt_bf16"}]
    path.write_text(json.dumps(content))
    weight = pyquant.quantize(torch.randn(512, 512, device="cuda"), "int4", 128).pack()
    x = torch.randn(1, 512, device="cuda", dtype=torch.bfloat16)
    before = pyquant.explain(x, weight)
    try:
        pyquant.load_table(path)
        expected = "cuda_dequant, then torch.nn.functional.linear (chosen by the table)"
        assert str(pyquant.explain(x, weight)) == expected
    finally:
        pyquant.load_table(None)
    assert pyquant.explain(x, weight) == before
