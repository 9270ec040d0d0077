"""``pyquant bench --model`` with bitsandbytes' layers handed to ``pyquant.accelerate``: with the package where it is
installed, and with a stand-in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import bitsandbytes_cases as cases
import pytest
import torch
from click.testing import CliRunner, Result
from torch._dynamo.utils import counters

from pyquant import _linear4bit
from pyquant.bench.model import accelerated
from pyquant.bench.model import parts as model_parts
from pyquant.bench.model.decoder import Decoder
from pyquant.bench.model.decoders import PLAIN, build
from pyquant.bench.model.decoding import Decoding
from pyquant.bench.model.memory import Memory
from pyquant.bench.model.parts import time_of_parts
from pyquant.bench.model.rows import ModelRow
from pyquant.bench.model.variants import ACCELERATED, linears_of, parse_variant, weight_bytes
from pyquant.bench.model.verify import check_logits
from pyquant.cli import bench_model, main
from pyquant.profiler.models import CONFIGS

TINY = CONFIGS["llama-tiny"]
CPU = ("--model", "llama-tiny", "--device", "cpu", "--input", 6, "--output", 5, "--batch", 2, "--model-code", "plain")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def stand_in() -> Any:
    """What the benchmark uses of the package, of the tests' own classes."""

    def linear(k: int, n: int, *, bias: bool, compute_dtype: torch.dtype, quant_type: str, compress_statistics: bool,
               device: str) -> cases.Linear4bit:  # fmt: skip
        return cases.Linear4bit(k, n, bias, compute_dtype, quant_type=quant_type, nested=compress_statistics)

    def parameter(data: torch.Tensor, *, quant_type: str, compress_statistics: bool, **_: Any) -> cases.Params4bit:
        return cases.Params4bit(*cases.quantize_4bit(data.float(), quant_type, nested=compress_statistics))

    package: Any = ModuleType("bitsandbytes")
    package.nn = SimpleNamespace(Linear4bit=linear, Params4bit=parameter)
    package.functional = SimpleNamespace(dequantize_4bit=lambda w, state: cases.dense(w, state).to(state.dtype))
    return package


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    package = stand_in()
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return package


@pytest.fixture(params=["stand-in", "installed"])
def library(request: pytest.FixtureRequest) -> None:
    if request.param == "installed":
        pytest.importorskip("bitsandbytes")
    else:
        request.getfixturevalue("fake")


def decoder_of(name: str, layers: int = TINY.layers) -> Decoder:
    decoder = build(PLAIN, replace(TINY, layers=layers), "cpu")
    variant = parse_variant(name)
    with torch.no_grad():
        variant.apply(decoder)
    if variant.accelerated:
        accelerated.accelerate_decoder(decoder, set(linears_of(decoder)), "cpu", Memory("cpu"))
    return decoder


def test_its_rows(library: None) -> None:
    variants = ("bf16", "bnb_nf4", *ACCELERATED)
    result = run(*CPU, "--variants", ",".join(variants), "--modes", "eager", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["variant"]: row for row in json.loads(result.stdout)}
    assert tuple(rows) == variants
    assert all(row["tpot_ms"] > 0 and row["linear_ms"] > 0 for row in rows.values())
    for name in ACCELERATED:
        assert rows[name]["accelerate_s"] > 0
        assert (rows[name]["check"], rows[name]["reason"]) == ("passed", "")
    for name in ("bf16", "bnb_nf4"):
        assert (rows[name]["accelerate_s"], rows[name]["check"]) == (None, "")
    memory = {row[column] for row in rows.values() for column in ("weights_gb", "peak_gb", "accelerate_peak_gb")}
    assert memory == {None}, "of a GPU only"
    codes = rows["bf16"]["linear_bytes"] // 4
    assert codes < rows["bnb_nf4_nested-accelerated"]["linear_bytes"] < rows["bnb_nf4-accelerated"]["linear_bytes"]
    assert rows["bnb_nf4-accelerated"]["linear_bytes"] == pytest.approx(rows["bnb_nf4"]["linear_bytes"], rel=0.03)


def test_the_table_of_accelerate(fake: Any) -> None:
    result = run(*CPU, "--variants", "bnb_nf4-accelerated", "--modes", "eager", "--no-verify")
    assert result.exit_code == 0, result.output
    _, table = result.stdout.split("pyquant.accelerate")
    (line,) = [line.split() for line in table.splitlines() if "bnb_nf4-accelerated" in line]
    assert float(line[1]) > 0
    assert "GPU memory, GB (1e9 bytes)" not in result.stdout


@pytest.mark.parametrize("name", ACCELERATED)
def test_modules_and_bytes(name: str, library: None) -> None:
    decoder = decoder_of(name)
    layers = linears_of(decoder)
    assert len(layers) == 4 * TINY.layers
    assert {type(m).__name__ for m in layers.values()} == {"Linear4bit"}
    assert sum(m.weight.numel() for m in layers.values()) == 0, "the original bytes are freed"
    packed = [accelerated.packed_of(m) for m in layers.values()]
    assert weight_bytes(decoder) == sum(weight.nbytes for weight in packed)
    assert check_logits(decoder, 2, "cpu")[0] == "passed"
    assert linears_of(decoder) == layers, "the layers are back"


@pytest.mark.parametrize("name", ACCELERATED)
def test_the_reference_is_what_the_library_reads(name: str, library: None) -> None:
    before = decoder_of(name.removesuffix("-accelerated"))
    state = linears_of(before)["layers.0.layer.qkv"].weight.quant_state
    expected = cases.dense(linears_of(before)["layers.0.layer.qkv"].weight.data, state)
    module = linears_of(decoder_of(name))["layers.0.layer.qkv"]
    got = accelerated.dequantized_by_bitsandbytes(module, torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_logits_that_are_not_the_librarys(factor: float, fake: Any) -> None:
    dense = fake.functional.dequantize_4bit
    fake.functional.dequantize_4bit = lambda w, state: dense(w, state) * factor
    result = run(*CPU, "--variants", "bnb_nf4-accelerated", "--modes", "eager")
    assert result.exit_code == 1
    assert "Error: bnb_nf4-accelerated, batch 2, eager: incorrect, relative error of the logits" in result.stderr


def test_all_layers_share_what_is_compiled(library: None) -> None:
    decoder = decoder_of("bnb_nf4-accelerated", layers=12)
    decoding = Decoding(decoder, 2, 6, 5, "cpu")
    torch._dynamo.reset()
    counters.clear()
    decoding.measure("compile")
    assert counters["stats"]["unique_graphs"] == 2, "of a prompt and of a token"
    assert not counters["graph_break"]


def test_linear_layers_have_their_part(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_parts, "_own_us", lambda event: 1.0)
    decoding = Decoding(decoder_of("bnb_nf4-accelerated"), 1, 4, 4, "cpu")
    decoding.warm_up()
    before = time_of_parts(decoding)
    compute = _linear4bit.packed_linear

    def slow(*arguments: Any) -> torch.Tensor:
        for _ in range(100):
            y = compute(*arguments)
        return y

    monkeypatch.setattr(_linear4bit, "packed_linear", slow)
    after = time_of_parts(decoding)
    more = {part: after[part] / before[part] for part in before}
    # Beside the GEMMs the range itself is an event.
    assert more == pytest.approx({**dict.fromkeys(before, 1), "linear": 50}, rel=0.3), more


# ---- what fails


def _without_state(fake: Any, is_broken: Callable[[int], bool]) -> None:
    """Layers, counted from 0, whose weights are not quantized."""
    make, count = fake.nn.Params4bit, iter(range(100))

    def parameter(*arguments: Any, **options: Any) -> cases.Params4bit:
        made = make(*arguments, **options)
        if is_broken(next(count)):
            made.quant_state = None
        return made

    fake.nn.Params4bit = parameter


def test_a_layer_that_is_kept_is_a_failure(fake: Any) -> None:
    _without_state(fake, lambda i: i == 1)
    result = run(*CPU, "--variants", "bnb_nf4-accelerated,bf16", "--modes", "eager", "--json")
    assert result.exit_code == 1
    base, row = json.loads(result.stdout)
    assert base["tpot_ms"] > 0
    assert row["reason"].startswith(
        "RuntimeError: accelerate: 1 of 8 layers kept; layers.0.layer.out: its weight has no quant_state"
    )
    assert (row["tpot_ms"], row["accelerate_s"]) == (None, None)


def test_nothing_to_accelerate_is_a_failure(fake: Any) -> None:
    _without_state(fake, lambda i: True)
    result = run(*CPU, "--variants", "bnb_nf4-accelerated,bf16", "--modes", "eager", "--json")
    assert result.exit_code == 1
    assert "found no Linear4bit" in json.loads(result.stdout)[1]["reason"]
    assert "; layers.0.layer.qkv: its weight has no quant_state" in json.loads(result.stdout)[1]["reason"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    result = run(*CPU, "--variants", "bf16,bnb_nf4-accelerated", "--modes", "eager")
    assert result.exit_code == 0, "not pyquant's failure"
    assert "bnb_nf4-accelerated: not available because bitsandbytes cannot be imported" in result.stderr


# ---- memory


class Allocator:
    """What torch.cuda says of one that hands out ``now`` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        self.cleared = 0

        def reset() -> None:
            self.most = self.now

        def clear() -> None:
            self.cleared += 1

        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    def take(self, nbytes: int) -> None:
        self.now += nbytes
        self.most = max(self.most, self.now)


def test_memory_is_what_was_taken_since(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = Allocator(monkeypatch)
    allocator.take(5_000_000_000)  # of another variant
    memory = Memory("cuda")
    allocator.take(2_000_000_000)
    allocator.take(-500_000_000)
    assert memory.allocated() == 1.5
    memory.start_peak()
    assert memory.peak() == 1.5
    allocator.take(1_000_000_000)
    allocator.take(-1_000_000_000)
    assert (memory.allocated(), memory.peak()) == (1.5, 2.5)
    memory.start_peak()
    assert memory.peak() == 1.5
    assert allocator.cleared == 5, "workspaces of streams count for nobody"


def test_the_table_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(*CPU, "--variants", "bf16", "--modes", "eager", "--json")
    (measured,) = json.loads(result.stdout)
    row = ModelRow(**measured)
    rows = [replace(row, batch=batch, mode=mode, weights_gb=5.25, peak_gb=peak)
            for batch, mode, peak in [(1, "eager", 5.5), (1, "graph", 5.75), (4, "eager", 6.125)]]  # fmt: skip
    rows.append(replace(row, variant="bnb_nf4-accelerated", weights_gb=5.0, peak_gb=5.4, accelerate_s=1.5,
                        accelerate_peak_gb=5.3))  # fmt: skip
    bench_model._report(rows, as_json=False)
    out = capsys.readouterr().out
    _, memory = out.split("GPU memory, GB (1e9 bytes)")
    memory, cost = memory.split("pyquant.accelerate")
    cells = [line.split() for line in memory.splitlines()]
    assert ["bf16", "5.250", "5.750", "6.125"] in cells
    assert ["bnb_nf4-accelerated", "5.000", "5.400"] in [line[:3] for line in cells]
    assert ["bnb_nf4-accelerated", "1.500", "5.300"] in [line.split() for line in cost.splitlines()]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "graph", "compile", "compile-graph"])
def test_on_a_gpu(mode: str) -> None:
    pytest.importorskip("bitsandbytes")
    options = ("--input", 16, "--output", 16, "--batch", "1,4", "--model-code", "plain", "--layers", 12, "--json")
    result = run("--model", "llama-tiny", "--modes", mode, "--variants", ",".join(("bnb_nf4", *ACCELERATED)), *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == 6
    assert all(0 < row["weights_gb"] <= row["peak_gb"] for row in rows)
    for row in rows[2:]:
        assert (row["check"], row["reason"]) == ("passed", "")
        assert row["accelerate_s"] > 0
        assert row["weights_gb"] <= row["accelerate_peak_gb"]
    # In a model so small the allocator's blocks of 512 bytes show.
    assert rows[2]["weights_gb"] < 1.1 * rows[0]["weights_gb"], "the original bytes are freed"
