"""The report of a sweep: its figures by hand, the page and the pictures from rows of a file."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pd = pytest.importorskip("pandas")

from test_bench import make_row, run, write_rows  # noqa: E402

from pyquant.bench.report.charts import heatmaps, log_ticks, roofline_chart, speedup_chart, time_charts  # noqa: E402
from pyquant.bench.report.crossover import crossover, crossovers  # noqa: E402
from pyquant.bench.report.outliers import camping, slow_shapes, with_neighbours  # noqa: E402
from pyquant.bench.report.roofline import ceilings, intensity  # noqa: E402
from pyquant.bench.report.sweep import medians, sweep_of  # noqa: E402
from pyquant.bench.rows import Row, read_csv  # noqa: E402

H200 = Path(__file__).resolve().parent.parent / "profiles" / "h200"


def cell(provider: str, us: float, m: int = 1, n: int = 4096, **changes: object) -> Row:
    """A row of K = 4096; cuBLAS reads four times the bytes."""
    dense = provider.startswith("cublas")
    fields = {"format": "bf16" if dense else "nf4", "weight_bytes": n * 4096 * (4 if dense else 1) // 2}
    return make_row(provider=provider, us=us, m=m, n=n, tflops=2 * m * n * 4096 / us / 1e6, **{**fields, **changes})


def pair(ours: float, cublas: float, **where: int) -> list[Row]:
    return [cell("cublas_bf16", cublas, **where), cell("pyquant", ours, **where)]


def test_rows_are_compared_on_their_problem() -> None:
    rows = [*pair(5, 10), *pair(8, 10, m=64), *pair(5, 40, n=8192), cell("dequant+cublas", 30), cell("pyquant", 7)]
    rows.append(cell("pyquant", 0.1, check="incorrect"))
    sweep = sweep_of(rows)
    mine = sweep[sweep["label"] == "pyquant nf4"].set_index(["n", "m"])
    assert mine["us"].to_dict() == {(4096, 1): 6, (4096, 64): 8, (8192, 1): 5}, "the median of two, none incorrect"
    assert mine["speedup"].round(3).to_dict() == {(4096, 1): 1.667, (4096, 64): 1.25, (8192, 1): 8}
    assert mine["dequant_us"].dropna().to_dict() == {(4096, 1): 30}
    table = medians(sweep).set_index(["label", "m"])
    assert table.loc[("pyquant nf4", 1), "speedup"] == pytest.approx((10 / 6 + 8) / 2)
    assert table["shapes"].to_dict()[("pyquant nf4", 64)] == 1


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(ValueError, match="report: gpu: expected rows of one GPU, got NVIDIA H100, NVIDIA H200"):
        sweep_of([*pair(5, 10), make_row(gpu="NVIDIA H100")])
    with pytest.raises(ValueError, match="report: provider: expected rows of cublas"):
        sweep_of([make_row()])


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ([(1, 2.0), (64, 1.5)], float("inf")),
        ([(1, 0.9), (64, 1.5)], 0.0),
        ([(1, 2.0), (16, 2.0), (64, 0.5)], 32.0),  # half way in log2 M and log2 of the speedup
        ([(1, 2.0), (16, 1.0), (64, 0.5), (128, 2.0)], 16.0),  # the first of several
    ],
)
def test_crossover(speedups: list[tuple[int, float]], expected: float) -> None:
    assert crossover(speedups) == pytest.approx(expected)


def test_crossovers_say_how_far_was_measured() -> None:
    rows = [*pair(5, 10), *pair(10, 20, m=16), *pair(20, 10, m=64)]
    rows += [*pair(5, 10, n=8192), *pair(6, 10, n=8192, m=16)]
    found = crossovers(sweep_of(rows))
    line = found.iloc[0]
    assert (line["x"], line["weights"], line["compared with"]) == ("bf16", "pyquant nf4", "cuBLAS")
    assert (line["lowest"], line["highest"], line["shapes"]) == ("32", "above 16", 2)


def test_neighbours_of_powers_of_two() -> None:
    assert with_neighbours([(4096, 512), (6144, 512), (4096, 512)]) == [
        (4096, 512),
        (3968, 512),
        (4224, 512),
        (6144, 512),
    ]
    assert with_neighbours([(512, 512)]) == [(512, 512)], "128 less or more is not near"


def test_memory_camping_is_called_out() -> None:
    assert camping(sweep_of(pair(5, 10))) is None, "no neighbours"
    rows = [
        row for n, us in ((3968, 9.0), (4096, 12.0), (4224, 9.6)) for m in (1, 16) for row in pair(us, 10, n=n, m=m)
    ]
    rows += [*pair(9.3, 10, m=32), *pair(9.0, 10, n=3968, m=32), *pair(9.6, 10, n=4224, m=32)]
    found = camping(sweep_of(rows))
    assert found is not None
    line = found[found["who"] == "pyquant nf4"].iloc[0]
    assert (line["shape"], line["neighbours"], line["measured"]) == ("4096 x 4096", "3968, 4224", 3)
    assert line["slower at"] == "1, 16", "at 32 a row takes as long as the neighbours'"
    assert line["worst"] == pytest.approx((12 / 4096) / ((9 / 3968 + 9.6 / 4224) / 2) - 1)
    assert found[found["who"] == "cublas_bf16"]["slower at"].tolist() == ["none"]


def test_slow_shapes_are_called_out() -> None:
    rows = [row for n in (1024, 2048, 4096) for row in pair(5, 20, n=n)]
    found = slow_shapes(sweep_of([*rows, *pair(10, 20, n=8192)]))
    assert found[["shape", "M", "speedup", "median"]].to_numpy().tolist() == [["8192 x 4096", 1, 2.0, 4.0]]
    assert slow_shapes(sweep_of(rows)).empty


def test_ceilings_are_those_of_the_rows() -> None:
    rows = [*pair(5, 10, m=64), *pair(50, 40, m=2048)]
    sweep = sweep_of(rows)
    limits = ceilings(sweep)
    assert limits.tb_per_s == pytest.approx(2 * 4096 * 4096 / 3.5 / 1e6)  # cuBLAS's bytes in the floor of make_row
    assert limits.tflops == pytest.approx(2 * 2048 * 4096 * 4096 / 40 / 1e6)
    assert limits.at == "1718 TFLOP/s, 4096 x 4096, M = 2048"
    assert limits.tflops_at(1) == pytest.approx(limits.tb_per_s)
    assert limits.tflops_at(1e6) == limits.tflops
    mine = sweep.assign(i=intensity(sweep)).set_index(["label", "m"])["i"]
    assert mine[("pyquant nf4", 64)] == pytest.approx(2 * 64 * 4096 * 4096 / (4096 * 4096 / 2 + 2 * 64 * 8192))
    without = sweep_of([row for r in rows for row in [make_row(**{**r.__dict__, "floor_us": None})]])
    assert ceilings(without).tb_per_s is None


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.3, 40], [0.5, 1, 2, 5, 10, 20]),
        ([0.9, 4], [1, 2, 3, 4]),
        ([0.7, 1.22], [0.7, 0.8, 0.9, 1, 1.1, 1.2]),
        ([3.0], [2.9, 2.95, 3, 3.05, 3.1, 3.15]),
    ],
)
def test_ticks_are_round_numbers(values: list[float], ticks: list[float]) -> None:
    assert log_ticks(values) == pytest.approx(ticks)


def test_charts_of_an_h200() -> None:
    from pyquant.bench.plot import styles_of

    rows = [
        row for row in read_csv(H200 / "prefill.csv") if row.label in ("cublas_bf16", "pyquant int4-g64", "pyquant nf4")
    ]
    sweep, styles = sweep_of(rows), styles_of(rows)
    speedups = speedup_chart(sweep, "bf16", styles)
    assert [line.label for line in speedups.lines] == ["pyquant int4-g64", "pyquant nf4"], "cuBLAS is the reference"
    assert speedups.ticks == [33, 64, 128, 256, 512, 1024, 2048], "96 and 192 have no room"
    assert len(time_charts(sweep, styles)) == 4
    roof = roofline_chart(sweep, "bf16", styles)
    assert roof.lines[0].label == "measured ceilings"
    assert "floor kernel 4.39 TB/s; cuBLAS 757 TFLOP/s" in roof.subtitle
    few = roofline_chart(sweep_of(read_csv(H200 / "fp32.csv")), "fp32", styles_of(read_csv(H200 / "fp32.csv")))
    assert "cuBLAS at most 8 TFLOP/s" in few.subtitle, "up to 8 tokens it is no ceiling"
    ceiling = few.lines[0]
    assert ceiling.y[-1] / ceiling.x[-1] == pytest.approx(ceiling.y[0] / ceiling.x[0])
    first = heatmaps(sweep)[0]
    assert (len(first.rows), len(first.columns)) == (4, 9)


def test_report_of_a_file(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    folder = tmp_path / "out"
    result = run("--from-csv", H200 / "prefill.csv", "--from-csv", H200 / "decode.csv", "--report", folder)
    assert result.exit_code == 0, result.output
    names = {"index.html", "rows.csv", "speedup_bf16.png", "shapes_bf16.png", "roofline_bf16.png"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert f"wrote {folder / name}" in result.stderr
    page = (folder / "index.html").read_text()
    assert re.findall(r"<script[^>]*\ssrc=", page) == [], "nothing is fetched"
    assert page.count("Plotly.newPlot(") == 4
    assert page.count("plotly.js v") == 1, "the script once, inside"
    for words in ("NVIDIA H200", "Crossover", "Memory camping", "Roofline", "pyquant nf4", "times as fast"):
        assert words in page
    assert len(read_csv(folder / "rows.csv")) == sum(
        len(read_csv(H200 / f"{name}.csv")) for name in ("prefill", "decode")
    )
    for name in names - {"index.html", "rows.csv"}:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_names_in_the_page_are_text(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from pyquant.bench.report.write import write_report

    write_report([row for r in pair(5, 10) for row in [make_row(**{**r.__dict__, "gpu": "<b>GPU</b>"})]], tmp_path)
    assert "<b>GPU</b>" not in (tmp_path / "index.html").read_text()


def test_rows_are_kept_where_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    path = write_rows(tmp_path / "a.csv", [make_row()])
    result = run("--from-csv", path, "--report", tmp_path / "out")
    assert result.exit_code == 1
    assert "report: provider: expected rows of cublas" in result.stderr
    assert read_csv(tmp_path / "out" / "rows.csv") == [make_row()]


def test_cublas_must_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    result = run("--report", "out", "--provider", "pyquant")
    assert result.exit_code == 2
    assert "--report compares with cublas" in result.stderr


def test_what_a_report_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.csv", [make_row()])
    monkeypatch.setitem(sys.modules, "plotly", None)
    result = run("--from-csv", path, "--report", tmp_path / "out")
    assert result.exit_code == 1
    assert "needs plotly: pip install 'pyquant[profile]'" in result.stderr
    result = run("--device", "cpu", "--report", tmp_path / "out")
    assert result.exit_code == 2
    assert "--report is not for --device cpu" in result.stderr
