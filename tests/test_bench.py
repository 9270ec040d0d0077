"""The benchmark: what needs no GPU, with a clock and a device made up; and the protocol itself on a GPU."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from conftest import DTYPES

from pyquant.bench import device, gpu, graph_timing
from pyquant.bench.environment import Environment
from pyquant.bench.format_spec import FormatSpec, parse_format_spec
from pyquant.bench.graph_timing import Timing
from pyquant.bench.providers import NAMES, Cublas, Operand, Provider, Source, Unavailable, select
from pyquant.bench.providers.base import import_peer, unsigned_codes
from pyquant.bench.providers.tinygemm import Tinygemm
from pyquant.bench.providers.vllm import Machete, Marlin, _gptq_codes, marlin_scales
from pyquant.bench.rows import COLUMNS, INSTANCE_PROVIDER, Row, csv_writer, read_csv
from pyquant.bench.shapes_file import read_shapes
from pyquant.cli import bench_gpu, main
from pyquant.formats import FORMATS

ENVIRONMENT = Environment("GPU", "1.2", 1980, None, "2.11", "13.0", "0.1", "abc1234", "2026-01-01", "pyquant bench")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


# ---- format specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("nf4", FormatSpec("nf4")),
        ("int4-g128", FormatSpec("int4", 128)),
        ("int4-gK", FormatSpec("int4", -1)),
        ("nf4-nested", FormatSpec("nf4", None, True)),
        ("nf4-g256-nested", FormatSpec("nf4", 256, True)),
        ("mxfp4-g32", FormatSpec("mxfp4", 32)),
    ],
)
def test_format_spec(text: str, spec: FormatSpec) -> None:
    assert parse_format_spec(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "name[-gN][-nested]"),
        ("NF4", "name[-gN][-nested]"),
        ("nf4-", "name[-gN][-nested]"),
        ("nf4-nested-g64", "name[-gN][-nested]"),
        ("nf4-g", "name[-gN][-nested]"),
        ("nf4-g64-nested ", "name[-gN][-nested]"),
        ("int7", "expected one of nf4"),
        ("int4-nested", "nested scales"),
        ("mxfp4-g64", "expects 32"),
        ("int4-g0", "power of two"),
    ],
)
def test_wrong_format_specs(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"format") as error:
        parse_format_spec(text)
    assert words in str(error.value)


def test_each_format_can_be_measured() -> None:
    assert len(FORMATS) > 5
    for name, fmt in FORMATS.items():
        weight = parse_format_spec(name).quantize(torch.randn(8, 128))
        assert weight.format == fmt
        assert weight.group_size == (fmt.group_size or 128)
    assert parse_format_spec("int4-gK").quantize(torch.randn(8, 192)).group_size == 192


# ---- rows and files


def make_row(**changes: Any) -> Row:
    row = Row(
        m=1,
        n=4096,
        k=4096,
        format="nf4",
        group_size=64,
        dtype="bf16",
        provider="pyquant",
        instance="cuda_stream_a",
        us=5.125,
        us_p10=5.0,
        us_p90=5.5,
        do_bench_us=None,
        copies=54,
        weight_bytes=9437184,
        gb_per_s=1841.4,
        tflops=6.547,
        floor_us=3.5,
        floor_fraction=0.6829,
        ratio_to_cublas=2.5,
        best_peer="tinygemm",
        ratio_to_best_peer=1.3,
        check="passed",
        error=0.0017,
        gpu="NVIDIA H200",
        driver="580.0",
        sm_clock_mhz=1980,
        mem_clock_mhz=None,
        torch="2.11.0",
        cuda="13.0",
        pyquant="0.1.0",
        commit="abc1234+dirty",
        date="2026-01-01T00:00:00Z",
        command='pyquant bench --csv "a b,c.csv"',
    )
    return replace(row, **changes)


def many_rows() -> list[Row]:
    """Two shapes, four lines, one of them without a floor."""
    rows = []
    for n in (4096, 8192):
        for m in (1, 8, 64):
            rows.append(make_row(n=n, m=m, us=5.0 + m))
            rows.append(make_row(n=n, m=m, us=9.0 + m, format="nf4-nested", check=""))
            rows.append(make_row(n=n, m=m, us=12.0, provider="cublas_bf16", format="bf16", group_size=None, check=""))
            rows.append(make_row(n=n, m=m, us=7.0 + 2 * m, provider="tinygemm", floor_us=None, floor_fraction=None))
    return rows


def write_rows(path: Path, rows: list[Row]) -> Path:
    with csv_writer(path) as write:
        for row in rows:
            write(row)
    return path


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [make_row(), make_row(group_size=None, floor_us=None, error=None, check="", do_bench_us=8.5, instance="")]
    assert read_csv(write_rows(tmp_path / "a.csv", rows)) == rows


def test_csv_rows_are_on_the_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with csv_writer(path) as write:
        write(make_row())
        assert read_csv(path) == [make_row()]


def test_wrong_csv_files(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", [make_row()])
    header, line = path.read_text().splitlines()
    for text, words in (
        (header, "expected rows"),
        (f"{header}\n{line},1", "a.csv:2: expected"),
        (f"{header}\n1,2", "a.csv:2: expected"),
        (f"{header}\n{line.replace('5.125', 'fast')}", "a.csv:2: us: expected a number, got 'fast'"),
        (f"{header}\n{line.replace('5.125', '')}", "a.csv:2: us: expected a number, got ''"),
        (f"{header.replace('floor_us', 'flour_us')}\n{line}", "lacks floor_us; has flour_us"),
        ("", "lacks m, n, k"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.csv") as error:
            read_csv(path)
        assert words in str(error.value)
        result = run("--from-csv", path)
        assert result.exit_code == 1
        assert words in result.stderr


def test_labels_tell_lines_apart() -> None:
    assert make_row().label == "pyquant nf4"  # whatever instance ran: it may change with M
    assert make_row(provider="pyquant pdl", format="int4-g128").label == "pyquant pdl int4-g128"
    assert make_row(provider=INSTANCE_PROVIDER).label == "cuda_stream_a nf4"
    assert make_row(provider="cublas_bf16", format="bf16").label == "cublas_bf16"


def test_from_csv(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_rows(tmp_path / "a.csv", many_rows())
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        picture = tmp_path / f"a{suffix}"
        result = run("--from-csv", path, "--plot", picture)
        assert result.exit_code == 0, result.output
        assert picture.read_bytes().startswith(magic)
        assert picture.stat().st_size > 5000
    assert "4096 x 4096, bf16" in result.stdout
    assert "8192 x 4096, bf16" in result.stdout
    assert "NVIDIA H200, driver 580.0, SM 1980 MHz" in result.stdout
    table = [line.split() for line in result.stdout.splitlines() if "pyquant nf4 " in line]
    assert table[0][2:] == ["9.44", "3.50", "6.00", "13.00", "69.00"]
    rows = json.loads(run("--from-csv", path, "--json").stdout)
    assert [r["us"] for r in rows] == [r.us for r in many_rows()]


def test_plot_of_many_shapes_and_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pyquant.bench.plot import plot

    rows = [make_row(n=1024 * i, m=m, provider=INSTANCE_PROVIDER, instance=f"i{j}") for i in range(1, 7) for m in (1, 2)
            for j in range(12)]  # fmt: skip
    plot(rows, tmp_path / "many.png")
    plot([make_row(floor_us=None, floor_fraction=None)], tmp_path / "one.png")
    assert (tmp_path / "many.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5000


def test_plot_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--from-csv", write_rows(tmp_path / "a.csv", [make_row()]), "--plot", tmp_path / "a.png")
    assert result.exit_code == 1
    assert "pip install 'pyquant[profile]'" in result.stderr


def test_shapes_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"m": [1, 8], "models": {"a": [[64, 128], [32, 64]], "b": [[64, 128]]}}))
    assert read_shapes(path) == ([(64, 128), (32, 64)], [1, 8])
    for content in (
        "{",
        "[]",
        "{}",
        '{"models": {}}',
        '{"models": {"a": []}}',
        '{"models": {"a": [[1, 2, 3]]}}',
        '{"models": {"a": [[0, 2]]}}',
        '{"models": {"a": [[true, 2]]}}',
        '{"models": {"a": [[1, 2]]}, "m": [0]}',
        '{"models": {"a": [[1, 2]]}, "m": 4}',
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"shapes\.json: .*expected"):
            read_shapes(path)


# ---- the command line


def test_lists_on_the_cpu(tmp_path: Path) -> None:
    shapes, out = tmp_path / "shapes.json", tmp_path / "out.csv"
    shapes.write_text('{"m": [5], "models": {"a": [[96, 64]]}}')
    options = ("--device", "cpu", "--seconds", "0.05", "--json", "--hot", "--csv", out)
    result = run(*options, "--shape", "64x128,128x64", "--shape", "64x128", "--m", "1,2", "--m", "2",
                 "--format", "nf4-nested,int4-g32", "--shapes", shapes)  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert list(dict.fromkeys((r["n"], r["k"], r["m"]) for r in rows)) == [
        (n, k, m) for n, k in ((64, 128), (128, 64), (96, 64)) for m in (1, 2)
    ]
    assert {r["provider"] for r in rows} >= {"pyquant nf4-nested", "pyquant int4-g32", "F.linear"}
    assert len(list(csv.DictReader(out.open()))) == len(rows)
    rows = json.loads(run(*options[:6], "--shapes", shapes, "--format", "nf4").stdout)
    assert {r["m"] for r in rows} == {5}


def test_usage_errors(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "a.csv", [make_row()])
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--shape", "64"), "expected NxK"),
        (("--shape", "64x64,64x"), "expected NxK"),
        (("--m", "0"), "--m"),
        (("--m", "1,,2"), "--m"),
        (("--format", "int4-nested"), "nested scales"),
        (("--provider", "nobody"), "--provider"),
        (("--shapes", tmp_path / "none"), "--shapes"),
        (("--device", "cpu", "--instances"), "--instances is not for --device cpu"),
        (("--device", "cpu", "--plot", "a.png"), "--plot is not for --device cpu"),
        (("--device", "cuda", "--threads", "1"), "--threads is not for --device cuda"),
        (("--seconds", "1", "--pdl"), "--seconds is for the CPU, --pdl for a GPU"),
        (("--from-csv", good, "--m", "1"), "--m has no meaning with --from-csv"),
        (("--from-csv", tmp_path / "none"), "--from-csv"),
        (("--device", "cpu", "--csv", tmp_path / "none" / "a.csv"), "expected a folder"),
    ]
    for arguments, words in cases:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert words in result.stderr, arguments
        assert result.stdout == ""


def test_gpu_options_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (("--device", "cuda"), ("--instances",), ("--provider", "cublas")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert f"{' '.join(arguments[: 2 if arguments[0] == '--device' else 1])} needs an NVIDIA GPU" in result.stderr


# ---- providers


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up device and clock: 10 us a call and 1 for each copy of the weight, 4 us to read any weight."""
    monkeypatch.setattr(device, "NAME", "cpu")
    monkeypatch.setattr(device, "l2_bytes", lambda: 4096)
    monkeypatch.setattr(device, "free_bytes", lambda: 10**7)
    monkeypatch.setattr(device, "synchronize", lambda: None)
    monkeypatch.setattr(device, "release", lambda: None)
    monkeypatch.setattr(gpu.Floor, "us", lambda self, nbytes: 4.0)

    def time_graph(calls: list[Any], x: torch.Tensor, output_bytes: int) -> Timing:
        us = 10.0 + len(calls)
        return Timing(us, us - 1, us + 1, [call(x) for call in calls])

    monkeypatch.setattr(gpu, "time_graph", time_graph)
    monkeypatch.setattr(bench_gpu, "read_environment", lambda: ENVIRONMENT)


class Fake(Provider):
    """pyquant's part, with a fault at will."""

    name = "pyquant"
    ours = True

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def build(self, source: Source) -> Operand:
        if self.fault == "unavailable":
            raise Unavailable("it is made up")
        w = source.w.float()

        def call(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            if self.fault == "interrupt" and x.shape[0] == 3:
                raise KeyboardInterrupt
            if self.fault == "raise":
                raise RuntimeError("gemm: something\nis wrong")
            y = F.linear(x.float(), weight)
            if self.fault == "incorrect":
                y[-1, -1] += 1
            if self.fault == "nan":
                y[0, 0] = float("nan")
            return y.to(x.dtype)

        return Operand(w, call, 1000, "nf4", 64, lambda: w)


def plan(*providers: Provider, tokens: tuple[int, ...] = (1, 2, 3)) -> gpu.Plan:
    return gpu.Plan([(32, 64)], tokens, torch.bfloat16, providers)


@pytest.mark.usefixtures("on_cpu")
def test_rows_compare_providers() -> None:
    rows = list(gpu.measure(plan(Cublas(FormatSpec("nf4"), "bf16"), Fake()), ENVIRONMENT))
    assert all(isinstance(row, Row) for row in rows)
    cublas, ours = rows[0], rows[3]
    assert [(r.label, r.m) for r in rows] == [(label, m) for label in ("cublas_bf16", "pyquant nf4") for m in (1, 2, 3)]
    # Eight times the L2, in copies of 32 x 64 bf16 and of 1000 bytes.
    assert (cublas.copies, ours.copies) == (8, 33)
    assert (cublas.us, ours.us, ours.us_p10, ours.us_p90) == (18, 43, 42, 44)
    assert ours.ratio_to_cublas == ours.ratio_to_best_peer == round(18 / 43, 4)
    assert ours.best_peer == "cublas_bf16"
    assert ours.floor_fraction == round(4 / 43, 4)
    assert ours.gb_per_s == round(1000 / 43e-6 / 1e9, 1)
    assert ours.tflops == round(2 * 32 * 64 / 43e-6 / 1e12, 3)
    assert (ours.check, cublas.check, cublas.ratio_to_cublas) == ("passed", "passed", 1.0)
    assert ours.gpu == "GPU"


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("fault", ["incorrect", "nan"])
def test_incorrect_rows_fail_the_run(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as stop:
        bench_gpu.run_gpu(
            plan(Fake(fault)), csv_path=tmp_path / "a.csv", plot_path=None, report_path=None, as_json=False
        )
    assert stop.value.exit_code == 1
    assert {row.check for row in read_csv(tmp_path / "a.csv")} == {"incorrect"}
    out = capsys.readouterr()
    assert "incorrect" in out.out
    assert "pyquant nf4, M=1, 32 x 64: incorrect" in out.err


@pytest.mark.usefixtures("on_cpu")
def test_interrupted_runs_keep_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(click.exceptions.Exit) as stop:
        bench_gpu.run_gpu(
            plan(Fake("interrupt")), csv_path=tmp_path / "a.csv", plot_path=None, report_path=None, as_json=False
        )
    assert stop.value.exit_code == 130
    assert [row.m for row in read_csv(tmp_path / "a.csv")] == [1, 2]
    out = capsys.readouterr()
    assert "pyquant nf4" in out.out
    assert "2 of 3 cells" in out.err


@pytest.mark.usefixtures("on_cpu")
def test_rows_of_a_report_are_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "report", lambda rows, **options: None)  # a killed process comes to none
    with pytest.raises(click.exceptions.Exit):
        bench_gpu.run_gpu(
            plan(Fake("interrupt")), csv_path=None, plot_path=None, report_path=tmp_path / "out", as_json=False
        )
    assert [row.m for row in read_csv(tmp_path / "out" / "rows.csv")] == [1, 2]


@pytest.mark.usefixtures("on_cpu")
def test_reasons_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    providers = (Cublas(FormatSpec("nf4"), "bf16"), Fake("unavailable"))
    bench_gpu.run_gpu(
        plan(*providers), csv_path=None, plot_path=None, report_path=None, as_json=True
    )  # not available: not a failure
    out = capsys.readouterr()
    assert out.err == "pyquant: not available because it is made up\n"
    assert len(json.loads(out.out)) == 3
    with pytest.raises(click.exceptions.Exit) as stop:
        bench_gpu.run_gpu(
            plan(providers[0], Fake("raise")), csv_path=None, plot_path=None, report_path=None, as_json=True
        )
    assert stop.value.exit_code == 1
    assert capsys.readouterr().err == "pyquant: failed: RuntimeError: gemm: something\n"
    with pytest.raises(Exception, match="nothing could be measured"):
        bench_gpu.run_gpu(plan(Fake("unavailable")), csv_path=None, plot_path=None, report_path=None, as_json=True)


@pytest.mark.usefixtures("on_cpu")
def test_a_broken_device_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(device, "synchronize", broken)
    with pytest.raises(gpu.BrokenDevice, match=r"pyquant: RuntimeError: gemm: something; .* an illegal memory access"):
        list(gpu.measure(plan(Fake("raise")), ENVIRONMENT))


@pytest.mark.usefixtures("on_cpu")
def test_copies_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_bytes", lambda: 10_000)
    assert next(iter(gpu.measure(plan(Fake()), ENVIRONMENT))).copies == 6  # the first, and 5 in half of the memory
    monkeypatch.setattr(device, "free_bytes", lambda: 3_000)
    skip = next(iter(gpu.measure(plan(Fake()), ENVIRONMENT)))
    assert isinstance(skip, gpu.Skip)
    assert "3 copies of 0.0 GB do not fit" in skip.reason


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
def test_peers_say_why_they_are_absent(dtype: torch.dtype) -> None:
    source = Source(64, 96, dtype)
    with pytest.raises(Unavailable, match=r"no vLLM operator library .*_C::marlin_gemm.*--load-library"):
        Marlin().build(source)
    with pytest.raises(Unavailable, match=r"_C::machete_mm"):
        Machete().build(source)
    with pytest.raises(Unavailable, match="bf16 only" if dtype != torch.bfloat16 else "K must be a multiple of 128"):
        Tinygemm().build(source)
    with pytest.raises(Unavailable, match=r"no_such_package cannot be imported \(ModuleNotFoundError: No module"):
        import_peer("no_such_package")
    with pytest.raises(Unavailable, match="group_size"):
        source.quantized(FormatSpec("int4", 48))


@pytest.mark.usefixtures("on_cpu")
def test_pyquant_without_cuda_kernels_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyquant import _library

    rows = tuple({**row, "available": row["device"] == "cpu"} for row in _library.instances())
    monkeypatch.setattr(_library, "instances", lambda: rows)
    formats = [FormatSpec("nf4")]
    for name, words in (("pyquant", "no kernel"), ("dequant+cublas", "no dequantization kernel")):
        (provider,) = select([name], formats, "bf16", instances=False, pdl=False)
        with pytest.raises(Unavailable, match=f"{words} for this GPU"):
            provider.build(Source(64, 64, torch.bfloat16))
    with pytest.raises(Unavailable, match="no GEMM kernel for this GPU"):
        select(["pyquant"], formats, "bf16", instances=True, pdl=False)


def test_select_measures_pyquant_last() -> None:
    formats = [FormatSpec("nf4"), FormatSpec("int4", 128)]
    providers = select(NAMES, formats, "fp16", instances=False, pdl=True)
    labels = [p.label for p in providers]
    assert labels[0] == "cublas_fp16"
    assert labels[-4:] == ["pyquant", "pyquant pdl"] * 2
    assert [p.ours for p in providers] == [False] * 8 + [True] * 6
    assert isinstance(providers[0], Cublas)


def test_layouts_of_peers() -> None:
    """What vLLM's kernels are given, against the definition of their layouts."""
    w = torch.randn(128, 256)
    weight = FormatSpec("int4", 128).quantize(w)
    codes = torch.stack([unsigned_codes(weight) & 15, unsigned_codes(weight) >> 4], -1).view(128, 256)
    again = (codes.float() - 8) * weight.scales.repeat_interleave(128, 1)
    assert torch.equal(again, weight.dequantize())
    words = _gptq_codes(weight)
    assert words.shape == (32, 128)
    for k in (0, 1, 7, 8, 255):
        assert torch.equal(words[k // 8] >> 4 * (k % 8) & 15, codes[:, k].int())
    scales = marlin_scales(weight)
    assert scales.shape == (2, 128)
    order = [i + 8 * j for i in range(8) for j in range(8)]
    expected = weight.scales.t()[:, order + [64 + i for i in order]]
    assert torch.equal(scales, expected)


def test_columns_are_documented() -> None:
    text = (Path(__file__).resolve().parent.parent / "docs" / "performance.md").read_text()
    assert len(COLUMNS) > 20
    assert [c for c in COLUMNS if f"`{c}`" not in text] == []


@pytest.mark.parametrize("slow_ms", [0.0, 5.0, 25.0])
@pytest.mark.parametrize("replay_ms", [0.05, 1.0, 40.0])
def test_times_are_of_a_gpu_at_its_clocks(slow_ms: float, replay_ms: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause replays are 20% slower for some ms: none of those counts, and 15 others do."""
    now, replays = 0.0, 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    def replay() -> None:
        nonlocal now, replays
        now += replay_ms * (1.2 if now < slow_ms else 1)
        replays += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert graph_timing._replay(replay, 10) == pytest.approx((replay_ms * 100,) * 3)
    assert now < slow_ms + 50 + 20 * replay_ms, "nor do measurements take much longer for it"
    assert replays >= 17


# ---- on a GPU


@pytest.mark.gpu
def test_graph_time_is_that_of_cold_weights() -> None:
    """Reading 32 MB takes at least as long as the fastest memory allows; from a cache it would be faster."""
    from pyquant.bench.graph_timing import time_graph

    w = [torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(16)]
    x = torch.randn(1, 4096, device="cuda", dtype=torch.bfloat16)
    timing = time_graph([lambda x, w=w_i: F.linear(x, w) for w_i in w], x, 8192)
    assert timing.us_p10 <= timing.us <= timing.us_p90
    assert 32e6 / timing.us / 1e6 < 10, "more than 10 TB/s"
    assert len(timing.outputs) == 16
    assert len({y.data_ptr() for y in timing.outputs}) == 16
    expected = F.linear(x, w[3])
    assert torch.equal(timing.outputs[3], expected)


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    result = run("--device", "cuda", "--provider", "cublas,tinygemm", "--shape", "1024x1024", "--m", "1,16",
                 "--csv", path, "--hot")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = read_csv(path)
    assert [(r.provider, r.m, r.check) for r in rows] == [
        (provider, m, "passed") for provider in ("cublas_bf16", "tinygemm") for m in (1, 16)
    ]
    assert all(0.5 < r.us < 1000 and r.gpu == torch.cuda.get_device_name() for r in rows)


def test_the_module_adds_few_microseconds_to_the_operator() -> None:
    """No autograd wrapper (more than 20 us), no weight built in every call; nn.Linear's own part is the yardstick."""
    result = run("--overhead", "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    us = json.loads(result.stdout)
    assert min(us.values()) > 0
    torchs = us["nn.Linear_us"] - us["F.linear_us"]
    assert us["pyquant.nn.QuantLinear_us"] - us["torch.ops.pyquant.gemm_us"] <= torchs + 3
