"""Dispatch tables from measured times: build, check, diff, score, and the commands."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from table_data import DEQUANT, DEVICE, STREAM, TILE, bucket, entry, row, table, write_csv

from pyquant.cli import main
from pyquant.tables import Bucket, Entry, Table, read_table
from pyquant.tables.build import build_table, winners
from pyquant.tables.check import problems_of
from pyquant.tables.diff import changes
from pyquant.tables.lookup import Lookup
from pyquant.tables.measurements import read_measurements
from pyquant.tables.score import split_by_shape

ROOT = Path(__file__).resolve().parent.parent
H200 = ROOT / "profiles" / "h200" / "decode.csv"
GPU_STREAM, GPU_WGMMA, GPU_DEQUANT = "cuda_stream_int4_bf16", "cuda_wgmma_int4_bf16", "cuda_dequant"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["table", *map(str, arguments)])


def build(tmp_path: Path, *rows: dict[str, Any], margin: float = 0.02) -> Table:
    return build_table(read_measurements([write_csv(tmp_path / "rows.csv", *rows)]), margin)


def only(content: Table) -> tuple[Bucket, ...]:
    assert len(content.entries) == 1
    return content.entries[0].buckets


# ---- build


def test_winners_by_bucket_and_merged(tmp_path: Path) -> None:
    times = {1: (5, 9), 8: (6, 9), 16: (9, 9.5), 32: (17, 10), 64: (33, 11)}
    rows = [row(m, i, us) for m, pair in times.items() for i, us in zip((STREAM, TILE), pair, strict=True)]
    assert only(build(tmp_path, *rows)) == (bucket(1, 16, STREAM), bucket(17, None, TILE))


def test_noise_does_not_flip_the_winner() -> None:
    """Two instances as fast as each other, with 1% of noise: one of them over all M."""
    generator = random.Random(0)
    for _ in range(50):
        times = {1 << i: {name: 10 * generator.gauss(1, 0.01) for name in ("a", "b")} for i in range(14)}
        assert len(set(winners(times, 0.05))) == 1
    assert len(set(winners(times, 0))) == 2, "without a margin every M has its own winner"


def best_sequence(times: dict[int, dict[str, float]], margin: float) -> float:
    """The least cost of all sequences, by trying each."""
    return min(cost(times, list(names), margin) for names in itertools.product(*(t for t in times.values())))


def cost(times: dict[int, dict[str, float]], names: list[str], margin: float) -> float:
    from math import log, log1p

    losses = [log(t[name] / min(t.values())) for t, name in zip(times.values(), names, strict=True)]
    loss = sum(x if x > log1p(margin) else x / 100 for x in losses)
    return loss + log1p(margin) * sum(a != b for a, b in itertools.pairwise(names))


def test_winners_are_the_best_sequence() -> None:
    generator = random.Random(1)
    for _ in range(30):
        times: dict[int, dict[str, float]] = {}
        for m in range(1, 6):
            names = generator.sample("abc", generator.randint(1, 3))  # not every instance runs every M
            times[m] = {name: generator.uniform(8, 12) for name in names}
        assert cost(times, winners(times, 0.1), 0.1) == pytest.approx(best_sequence(times, 0.1))


def test_a_dense_winner_has_a_gemm_for_callers_without_one(tmp_path: Path) -> None:
    rows = [row(m, i, us) for m in (1, 64) for i, us in ((GPU_STREAM, m), (GPU_WGMMA, 40), (GPU_DEQUANT, 30))]
    assert only(build(tmp_path, *rows)) == (bucket(1, 1, GPU_STREAM), bucket(2, None, GPU_DEQUANT, GPU_WGMMA))


def test_on_a_cpu_no_call_ends_in_a_dense_gemm(tmp_path: Path) -> None:
    assert only(build(tmp_path, row(1, DEQUANT, 1.0), row(1, TILE, 2.0))) == (bucket(1, None, TILE),)
    with pytest.raises(ValueError, match=f"times of GEMM instances, got those of {DEQUANT}"):
        build(tmp_path, row(1, DEQUANT, 1.0))


@pytest.mark.parametrize("disposition", ["incorrect", "failed", "not supported"])
def test_what_is_not_right_does_not_win(disposition: str, tmp_path: Path) -> None:
    us: Any = 1.0 if disposition == "incorrect" else ""
    rows = [row(1, STREAM, us, disposition=disposition), row(1, TILE, 2.0)]
    assert only(build(tmp_path, *rows)) == (bucket(1, None, TILE),)


def test_repeated_measurements_count_by_their_median(tmp_path: Path) -> None:
    rows = [row(1, STREAM, us) for us in (1, 5, 6)] + [row(1, TILE, 4)]
    assert only(build(tmp_path, *rows)) == (bucket(1, None, TILE),)


def test_keys_are_encodings_not_names(tmp_path: Path) -> None:
    formats = {"nf4": 64, "fp4": 64, "nf4-nested": 64, "int4-gK": 4096, "uint4-g128": 128}
    built = build(tmp_path, *(row(1, TILE, 2, format=f, group_size=g) for f, g in formats.items()))
    assert {(e.encoding, e.group_size) for e in built.entries} == {
        ("codebook4", 64), ("codebook4-nested", 64), ("int4", 0), ("uint4", 128)
    }  # fmt: skip
    flat = build(tmp_path, row(1, TILE, 2, k=4100, format="nf4", group_size=64))
    assert flat.entries[0].encoding == "codebook4-flat"


def test_a_table_from_the_benchmarks_of_an_h200(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    result = run("build", H200, "-o", path, "--sms", 132)
    assert result.exit_code == 0, result.output
    assert "the largest M measured is 32" in result.output
    built = read_table(path)
    assert built.device == "NVIDIA H200"
    assert built.processors == 132
    assert built.provenance["driver"] == "580.159.04"
    assert built.provenance["csv"] == ["decode.csv"]
    assert len(built.entries) == 6 * 5  # shapes, formats
    assert built.instances == [
        "cuda_stream_codebook4_bf16",
        "cuda_stream_int4_bf16",
        "cuda_wgmma_codebook4_bf16",
        "cuda_wgmma_int4_bf16",
    ]
    shown = run("show", path)
    assert "cuda_stream_int4_bf16" in shown.output
    assert "driver: 580.159.04" in shown.output
    assert json.loads(run("show", path, "--json").output)["device"] == "NVIDIA H200"


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*/table.json")), ids=lambda path: path.parent.name)
def test_shipped_tables_are_built_from_their_csv_and_in_use(path: Path) -> None:
    shipped = read_table(path)
    provenance = shipped.provenance
    measurements = read_measurements([path.parent / name for name in provenance["csv"]])
    assert build_table(measurements, provenance["margin"]).to_json() == path.read_text()
    assert list(problems_of(shipped, measurements)) == []
    in_library = Lookup(device=shipped.device)
    for e in shipped.entries:
        for b in e.buckets:
            found = in_library.find(e.encoding, e.dtype, e.group_size, e.n, e.k, b.first)
            assert found is not None
            assert found.bucket == b
            assert (found.n, found.k) == (e.n, e.k)


def test_reading_back_what_was_written(tmp_path: Path) -> None:
    content = table(entry(), entry(64, 64, bucket(1, 7, DEQUANT, TILE), bucket(8, None, STREAM), dtype="fp32"))
    path = tmp_path / "t.json"
    path.write_text(content.to_json())
    assert read_table(path) == content
    assert sum('"encoding"' in line for line in content.to_json().splitlines()) == 2, "a line for each entry"


# ---- bad input


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    cells = row(1, TILE, 2.0)
    for column in ("gpu", "us", "format"):
        path = write_csv(tmp_path / "rows.csv", {k: v for k, v in cells.items() if k != column})
        with pytest.raises(ValueError, match=rf"rows\.csv: lacks the columns {column}$"):
            read_measurements([path])
    path = write_csv(tmp_path / "rows.csv", {k: v for k, v in cells.items() if k != "disposition"})
    with pytest.raises(ValueError, match="disposition"):
        read_measurements([path])


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"us": "fast"}, r"rows\.csv:3: us: expected a positive number, got 'fast'"),
        ({"us": -1}, r"rows\.csv:3: us: expected a positive number, got '-1"),
        ({"n": 0}, r"rows\.csv:3: n: expected a positive number"),
        ({"group_size": ""}, r"rows\.csv:3: group_size: expected a positive number"),
        ({"format": "int9"}, r"rows\.csv:3: .*got 'int9'"),
        ({"gpu": "Other GPU"}, r"gpu: expected one value in all rows, got 'Other GPU', 'Test GPU'"),
    ],
)
def test_bad_cells_are_named(cells: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", row(1, TILE, 2.0), {**row(2, TILE, 2.0), **cells})
    with pytest.raises(ValueError, match=words):
        read_measurements([path])


def test_times_of_different_kinds_do_not_mix(tmp_path: Path) -> None:
    rows = [row(1, TILE, 2.0, cache=cache, launch="graph") for cache in ("cold", "hot")]
    with pytest.raises(ValueError, match="cache: expected one value in all rows, got 'cold', 'hot'"):
        read_measurements([write_csv(tmp_path / "rows.csv", *rows)])


def test_a_csv_without_usable_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", row(1, "", 2.0, provider="cublas_bf16"))
    result = run("build", path, "-o", tmp_path / "t.json")
    assert result.exit_code == 1
    assert "expected rows of pyquant's instances that ran" in result.output


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    result = run("show", written(tmp_path, "t.json", entry()))
    assert result.exit_code == 1
    assert "needs jsonschema: pip install 'pyquant[profile]'" in result.output


# ---- explain, diff, check


def written(tmp_path: Path, name: str, *entries: Entry, device: str = DEVICE) -> Path:
    path = tmp_path / name
    path.write_text(table(*entries, device=device).to_json())
    return path


def test_explain_says_what_and_why(tmp_path: Path) -> None:
    path = written(tmp_path, "t.json", entry(4096, 4096, bucket(1, 16, STREAM), bucket(17, None, DEQUANT, TILE)))
    arguments = ("explain", "--format", "int4-g128", "--table", path, "--m")
    exact = run(*arguments, 16, "--n", 4096, "--k", 4096)
    assert exact.exit_code == 0, exact.output
    assert exact.output.splitlines()[0] == STREAM
    assert "measured int4, bf16, g128, 4096 x 4096, M = 1..16" in exact.output
    near = json.loads(run(*arguments, 17, "--n", 4000, "--k", 4096, "--json").output)
    assert near["instance"] == DEQUANT
    assert near["without_dense_gemm"] == TILE
    assert not near["measured"]
    assert near["nearest"] == {"n": 4096, "k": 4096, "group_size": 128}
    other = run("explain", "--format", "nf4", "--table", path, "--m", 1, "--n", 64, "--k", 64)
    assert other.exit_code == 1
    assert f"no table for {DEVICE} has codebook4 with bf16; the dispatch's rule decides" in other.output


def test_explain_of_a_gpu_without_a_table() -> None:
    arguments = ("explain", "--format", "uint4", "--m", 512, "--n", 4096, "--k", 4096, "--device", "NVIDIA Unheard-of")
    assert run(*arguments).exit_code == 1
    predicted = run(*arguments, "--sms", 78)
    assert predicted.exit_code == 0, predicted.output
    assert "NVIDIA Unheard-of, 78 SMs: predicted for uint4, bf16, g64, 4096 x 4096" in predicted.output
    without = run("explain", "--m", 1, "--n", 64, "--k", 64, "--sms", 78)
    assert without.exit_code == 2
    assert "--sms is for --device" in without.output


def test_diff(tmp_path: Path) -> None:
    old = table(entry(64, 64, bucket(1, 16, STREAM), bucket(17, None, TILE)), entry(128, 64))
    new = table(entry(64, 64, bucket(1, 8, STREAM), bucket(9, None, TILE)), entry(256, 64))
    found = [(c.entry.n, c.range, c.old, c.new) for c in changes(old, new)]
    assert found == [
        (64, "9..16", STREAM, TILE),
        (128, "1..", STREAM, None),
        (256, "1..", None, STREAM),
    ]
    assert not list(changes(old, old))
    a, b = (written(tmp_path, n, *t.entries) for n, t in (("a.json", old), ("b.json", new)))
    assert run("diff", a, a).exit_code == 0
    result = run("diff", a, b)
    assert result.exit_code == 1
    assert "9..16" in result.output
    assert "note" not in result.output
    assert json.loads(run("diff", a, b, "--json").output)[0]["m"] == "9..16"


def test_diff_of_two_devices_says_so(tmp_path: Path) -> None:
    """Beside the output, which stays JSON, and also where the choices are the same."""
    note = f"a.json is for {DEVICE}, {tmp_path / 'b.json'} for Other GPU"
    a, b = written(tmp_path, "a.json", entry(64, 64)), written(tmp_path, "b.json", entry(64, 64), device="Other GPU")
    same = run("diff", a, b)
    assert same.exit_code == 0
    assert note in same.stderr
    b = written(tmp_path, "b.json", entry(64, 64, bucket(1, None, TILE)), device="Other GPU")
    other = run("diff", a, b, "--json")
    assert other.exit_code == 1
    assert note in other.stderr
    assert json.loads(other.stdout)[0]["new"] == TILE


def test_check_finds_wrong_names_and_slow_choices(tmp_path: Path) -> None:
    good = written(tmp_path, "good.json", entry(4096, 4096, bucket(1, 16, STREAM), bucket(17, None, TILE)))
    csv = write_csv(tmp_path / "rows.csv", *(row(m, i, us) for m in (1, 16) for i, us in ((STREAM, 5), (TILE, 9))))
    result = run("check", good, csv)
    assert result.exit_code == 0, result.output
    assert "all is well" in result.output
    slow = run("check", written(tmp_path, "slow.json", entry(4096, 4096, bucket(1, None, TILE))), csv)
    assert slow.exit_code == 1
    assert f"M=1: {TILE} takes 9.00 us, {STREAM} 5.00 us" in slow.output
    assert "2 problems" in slow.output
    unknown = run("check", written(tmp_path, "unknown.json", entry(64, 64, bucket(1, None, "cuda_fast"))))
    assert unknown.exit_code == 1
    assert "entries[0].buckets[0].instance: no instance is called cuda_fast" in unknown.output
    other = run("check", written(tmp_path, "other.json", entry(), device="Other GPU"), csv)
    assert other.exit_code == 1
    assert f"the table is for Other GPU, the CSV of {DEVICE}" in other.output
    text = good.read_text()
    (tmp_path / "gap.json").write_text(text.replace("[17, null]", "[19, null]"))
    gap = run("check", tmp_path / "gap.json")
    assert gap.exit_code == 1
    assert "entries[0].buckets[1].m: gap: expected to start at 17, got 19" in gap.output


# ---- score


def scored(tmp_path: Path, csv: Path, *arguments: object) -> dict[str, Any]:
    result = run("score", csv, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_score_counts_losses_and_regressions(tmp_path: Path) -> None:
    """Four cells: the best, 4% off, 50% off and slower than the fallback, and one that was not measured."""
    times = {1: (10, 20), 2: (10.4, 10), 3: (15, 10), 4: (None, 10)}
    rows = [row(m, GPU_STREAM, a) for m, (a, _) in times.items() if a]
    rows += [row(m, GPU_WGMMA, b) for m, (_, b) in times.items()]
    rows += [row(m, GPU_DEQUANT, 14) for m in times]
    csv = write_csv(tmp_path / "rows.csv", *rows)
    score = scored(
        tmp_path, csv, "--table", written(tmp_path, "t.json", entry(4096, 4096, bucket(1, None, GPU_STREAM)))
    )
    assert (score["cells"], score["unknown"]) == (4, 1)
    assert score["ideal"] == pytest.approx(2 / 3)
    assert score["regressive"] == pytest.approx(1 / 3)
    assert score["mean_loss"] == pytest.approx((0 + 0.04 + 0.5) / 3)
    assert score["worst_loss"] == pytest.approx(0.5)
    assert (score["worst"]["m"], score["worst"]["choice"]) == (3, GPU_STREAM)
    text = run("score", csv)
    assert text.exit_code == 0
    assert "ideal" in text.output


def test_a_split_scores_shapes_that_the_table_has_not_seen(tmp_path: Path) -> None:
    """Narrow weights run best on one instance, wide ones on the other; neighbours tell."""
    rows = []
    for i in range(1, 21):
        narrow = i <= 10
        rows += [row(1, GPU_STREAM, 5 if narrow else 9, n=256 * i), row(1, GPU_WGMMA, 9 if narrow else 5, n=256 * i)]
    csv = write_csv(tmp_path / "rows.csv", *rows)
    measurements = read_measurements([csv])
    train, test = split_by_shape(measurements, 0.5, 0)
    assert len(set(train.times["n"])) == len(set(test.times["n"])) == 10
    assert not set(train.times["n"]) & set(test.times["n"])
    score = scored(tmp_path, csv, "--split", 0.5)
    assert score["cells"] == 10
    assert 0.8 <= score["ideal"] <= 1
    assert score["regressive"] is None
    assert scored(tmp_path, csv, "--split", 0.5) == score, "the seed decides"
    one = run("score", write_csv(tmp_path / "one.csv", row(1, TILE, 2.0)), "--split", 0.5)
    assert one.exit_code == 1
    assert "expected shapes on both sides" in one.output
