"""The library's lookup: the written rule for shapes, groups and M; what a loaded table does to calls; bad files."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from table_data import DEQUANT, DEVICE, STREAM, TILE, bucket, damage, entry, error_of_loading, table

import pyquant
from pyquant import _library
from pyquant.tables import Entry, Table, read_table
from pyquant.tables.lookup import Choice, Lookup

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _tables_of_the_build() -> Iterator[None]:
    yield
    pyquant.load_table(None)


def write(path: Path, content: Table) -> Path:
    path.write_text(content.to_json(), encoding="utf-8")
    return path


def find(content: Table, n: int, k: int, m: int = 1, group_size: int = 128, encoding: str = "int4") -> Choice | None:
    return Lookup(content).find(encoding, "bf16", group_size, n, k, m)


# ---- the rule


def test_every_m_has_its_bucket() -> None:
    content = table(entry(4096, 4096, bucket(1, 16, STREAM), bucket(17, 64, TILE), bucket(65, None, DEQUANT, TILE)))
    lookup = Lookup(content)
    expected = {1: STREAM, 16: STREAM, 17: TILE, 64: TILE, 65: DEQUANT, 10**12: DEQUANT}
    found = {m: lookup.find("int4", "bf16", 128, 4096, 4096, m) for m in expected}
    assert {m: c.bucket.instance for m, c in found.items() if c} == expected
    assert found[65] == Choice(bucket(65, None, DEQUANT, TILE), 128, 4096, 4096, predicted=False)


def reference(content: Table, n: int, k: int, group_size: int) -> Entry:
    """The rule of cutlass_ext/table.hpp, in words of its own."""
    sizes = {e: e.group_size or k for e in content.entries}
    near = min(content.entries, key=lambda e: (round(abs(math.log(sizes[e] / (group_size or k))), 9), sizes[e]))
    candidates = [e for e in content.entries if e.group_size == near.group_size]

    def waves(rows: int) -> float:
        return math.ceil(math.ceil(rows / 64) / content.processors) if content.processors else 1

    def distance(e: Entry) -> float:
        return math.log(e.n / n) ** 2 + math.log(e.k / k) ** 2 + math.log(waves(e.n) / waves(n)) ** 2

    return min(candidates, key=distance)


@pytest.mark.parametrize("processors", [None, 4, 132])
def test_an_unknown_shape_takes_the_nearest(processors: int | None) -> None:
    shapes = [(512, 2048), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (50257, 768), (128256, 4096)]
    entries = [
        entry(n, k, bucket(1, None, name), group_size=g)
        for (n, k), (g, name) in itertools.product(shapes, [(64, STREAM), (128, TILE), (0, STREAM)])
    ]
    content = table(*entries, processors=processors)
    lookup = Lookup(content)
    asked = list(itertools.product([100, 700, 3000, 9000, 60000], [512, 3420, 9999], [32, 64, 100, 128, 1024, 0]))
    assert asked
    for n, k, g in asked:
        found, expected = lookup.find("int4", "bf16", g, n, k, 5), reference(content, n, k, g)
        assert found is not None
        assert (found.n, found.k, found.group_size) == (expected.n, expected.k, expected.group_size), (n, k, g)


def test_waves_count() -> None:
    """With 4 SMs 256 rows are one wave and 257 two; without, 257 is nearer to 256."""
    shapes = (entry(200, 512), entry(256, 512), entry(380, 512))
    with_waves, without = (find(table(*shapes, processors=p), 300, 512) for p in (4, None))
    assert with_waves is not None
    assert without is not None
    assert (with_waves.n, without.n) == (380, 256)


def test_other_encodings_and_dtypes_have_no_answer() -> None:
    content = table(entry())
    assert find(content, 4096, 4096) is not None
    for encoding in ("uint4", "codebook4", "int8", "int4-nested", "int4-flat"):
        assert find(content, 4096, 4096, encoding=encoding) is None
    assert Lookup(content).find("int4", "fp16", 128, 4096, 4096, 1) is None
    assert Lookup(device="another").find("int4", "bf16", 128, 4096, 4096, 1) is None


def test_wrong_questions_are_refused() -> None:
    for encoding, words in (("int9", "encoding: expected such as int4"), ("int4-flat-nested", "got int4-flat-nested")):
        with pytest.raises(RuntimeError, match=words):
            _library.find_in_table(DEVICE, encoding, 2, 128, 64, 64, 1)
    with pytest.raises(RuntimeError, match=r"expected positive n, k and group_size, got 0, 64 and 128"):
        _library.find_in_table(DEVICE, "int4", 2, 128, 0, 64, 1)
    with pytest.raises(RuntimeError, match="dtype"):
        _library.find_in_table(DEVICE, "int4", 9, 128, 64, 64, 1)


# ---- calls


def cpu_table(first: str, then: str, last: int = 4) -> Table:
    buckets = (bucket(1, last, first), bucket(last + 1, None, then))
    return table(
        entry(64, 128, *buckets, encoding="codebook4", dtype="fp32", group_size=64),
        device=_library.device_name("cpu"),
        processors=None,
    )


def explanation(m: int, n: int = 64, k: int = 128) -> pyquant.Explanation:
    return pyquant.explain(torch.randn(m, k), pyquant.quantize(torch.randn(n, k), "nf4").pack())


def explain(m: int, n: int = 64, k: int = 128) -> str:
    return explanation(m, n, k).instance


def test_calls_use_the_table_of_the_cpu(tmp_path: Path) -> None:
    before = explain(1), explain(100)
    pyquant.load_table(write(tmp_path / "t.json", cpu_table(TILE, STREAM)))
    assert [explain(m) for m in (1, 4, 5, 100)] == [TILE, TILE, STREAM, STREAM]
    assert explain(1, n=100, k=200) == before[0], "groups that cross rows are not in the table"
    x, w = torch.randn(3, 128), pyquant.quantize(torch.randn(64, 128), "nf4").pack()
    torch.testing.assert_close(pyquant.linear(x, w), x @ w.dequantize().T)
    pyquant.load_table(write(tmp_path / "t.json", cpu_table(STREAM, TILE)))
    assert [explain(m) for m in (1, 4, 5, 100)] == [STREAM, STREAM, TILE, TILE]
    pyquant.load_table(None)
    assert (explain(1), explain(100)) == before


def test_explain_says_who_chose(tmp_path: Path) -> None:
    assert explanation(1).chosen_by == "rule"
    pyquant.load_table(write(tmp_path / "t.json", cpu_table(explain(1), TILE)))  # what the rule takes at M = 1, too
    assert explanation(1).chosen_by == "table"
    assert explanation(100).chosen_by == "table"
    assert explanation(1, n=100, k=200).chosen_by == "rule", "groups that cross rows are not in the table"
    pyquant.load_table(write(tmp_path / "t.json", cpu_table("cuda_stream_int4_bf16", DEQUANT)))
    assert explanation(1).chosen_by == "rule", "a choice that cannot run here"
    content = cpu_table(STREAM, TILE)
    dense = replace(content.entries[0], buckets=(bucket(1, None, DEQUANT, TILE),))
    pyquant.load_table(write(tmp_path / "t.json", replace(content, entries=(dense,))))
    assert explanation(1).chosen_by == "table", "the GEMM beside a dense choice"


def test_a_choice_that_cannot_run_here_leaves_the_rule(tmp_path: Path) -> None:
    before = explain(1), explain(100)
    pyquant.load_table(write(tmp_path / "t.json", cpu_table("cuda_stream_int4_bf16", DEQUANT)))
    assert (explain(1), explain(100)) == before


def test_a_dense_choice_gives_way_to_its_gemm_on_the_cpu(tmp_path: Path) -> None:
    content = cpu_table(STREAM, TILE)
    dense = replace(content.entries[0], buckets=(bucket(1, None, DEQUANT, TILE),))
    pyquant.load_table(write(tmp_path / "t.json", replace(content, entries=(dense,))))
    assert explain(1) == TILE


def test_tables_of_other_devices_stay(tmp_path: Path) -> None:
    pyquant.load_table(write(tmp_path / "cpu.json", cpu_table(TILE, STREAM)))
    pyquant.load_table(write(tmp_path / "gpu.json", table(entry())))
    assert explain(1) == TILE
    assert Lookup(device=DEVICE).find("int4", "bf16", 128, 4096, 4096, 1) is not None


# ---- bad files


def damaged() -> dict[str, tuple[str, str, str]]:
    """What is replaced in a good table, by what, and what the error says besides the line."""
    return {
        "no JSON": ('"schema": 1,', '"schema": 1', "expected '}', got '\"'"),
        "schema": ('"schema": 1', '"schema": 2', "schema: expected 1, got 2"),
        "instance": (STREAM, "cpu_fast", "instance: there is none called 'cpu_fast'"),
        "gap": ('"m": [17,', '"m": [18,', "m: gap: expected a bucket to start at 17, got 18"),
        "overlap": ('"m": [17,', '"m": [16,', "m: overlap: expected a bucket to start at 17, got 16"),
        "no end": ("[17, null]", "[17, 99]", "m: gap: expected null as the last bucket's end, got 99"),
        "two ends": ("[1, 16]", "[1, null]", "m: the bucket before has no end"),
        "backwards": ("[1, 16]", "[1, 0]", "m: expected an end of at least 1, got 0"),
        "encoding": ('"int4"', '"int9"', "encoding: expected such as int4"),
        "dtype": ('"bf16"', '"fp8"', "dtype: expected fp32, fp16 or bf16, got 'fp8'"),
        "size": ('"n": 4096', '"n": 0', "n: expected at least 1, got 0"),
        "float": ('"n": 4096', '"n": 4096.0', "expected an integer, got '.'"),
        "missing": ('"n": 4096, ', "", "an entry lacks one of encoding"),
        "unknown": ('"n": 4096', '"rows": 4096', "got 'rows'"),
        "dense gemm": (f'"{TILE}"}}', f'"{DEQUANT}", "gemm": "{DEQUANT}"}}', "gemm: expected a GEMM"),
        "deep": ('"margin": 0.02', '"margin": ' + "[" * 100 + "]" * 100, "expected less than 64 levels"),
    }


@pytest.mark.parametrize("case", damaged())
def test_a_bad_table_names_its_line_and_changes_nothing(case: str, tmp_path: Path) -> None:
    pyquant.load_table(write(tmp_path / "good.json", cpu_table(TILE, STREAM)))
    good = table(entry(4096, 4096, bucket(1, 16, STREAM), bucket(17, None, TILE))).to_json()
    old, new, words = damaged()[case]
    path = damage(tmp_path / "bad.json", good, old, new)
    number = int(error_of_loading(path, words).split("line ")[1].split(":")[0])
    changed = next(i for i, (a, b) in enumerate(zip(good.splitlines(), path.read_text().splitlines(), strict=True), 1)
                   if a != b)  # fmt: skip
    assert changed <= number <= changed + 1
    assert explain(1) == TILE, "the table before stays"
    if case not in ("deep", "instance", "dense gemm", "float"):  # the JSON schema allows those
        with pytest.raises(ValueError, match=r"bad\.json"):
            read_table(path)


def test_a_key_twice_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.json", table(entry(), entry()))
    with pytest.raises(ValueError, match="came before"):
        pyquant.load_table(path)
    with pytest.raises(ValueError, match=r"entries\[1\]: the same key as entries\[0\]"):
        read_table(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', "null"])
def test_files_that_are_no_table(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"load_table: .*bad\.json"):
        pyquant.load_table(path)
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_table(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load_table: cannot read .*none\.json: No such file"):
        pyquant.load_table(tmp_path / "none.json")


def test_the_environment_names_a_table(tmp_path: Path) -> None:
    code = (
        "import torch, pyquant; w = pyquant.quantize(torch.randn(64, 128), 'nf4').pack();"
        "print(pyquant.explain(torch.randn(1, 128), w))"
    )

    def run(path: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYQUANT_TABLE": str(path)}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    good = run(write(tmp_path / "t.json", cpu_table(TILE, STREAM)))
    assert good.stdout.strip() == f"{TILE} (chosen by the table)", good.stderr
    (tmp_path / "bad.json").write_text("{\n\n]")
    bad = run(tmp_path / "bad.json")
    assert bad.returncode != 0
    assert "bad.json: line 3: expected" in bad.stderr
