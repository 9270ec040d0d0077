"""``pyquant bench --model``: the decoders against each other, the whole command on the CPU, and on a GPU."""

from __future__ import annotations

import csv
import gc
import json
import sys
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

import pyquant
from pyquant.bench.gpu import BrokenDevice
from pyquant.bench.model import measure, variants
from pyquant.bench.model import parts as model_parts
from pyquant.bench.model.decoder import Decoder
from pyquant.bench.model.decoders import MODEL_CODES, PLAIN, build, choose_code
from pyquant.bench.model.decoding import Decoding
from pyquant.bench.model.parts import PARTS, parts_of_kernels, time_of_parts
from pyquant.bench.model.plain import PlainDecoder
from pyquant.bench.model.rows import ModelRow
from pyquant.bench.model.variants import linears_of, parse_variant, weight_bytes
from pyquant.bench.model.verify import check_logits
from pyquant.bench.providers import Operand, Provider, Source
from pyquant.cli import main
from pyquant.profiler.models import CONFIGS

TINY = CONFIGS["llama-tiny"]
CPU = ("--model", "llama-tiny", "--device", "cpu", "--input", 6, "--output", 5)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.fixture(params=MODEL_CODES)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    if request.param != PLAIN:
        pytest.importorskip("transformers")
    return build(choose_code(request.param)[0], TINY, "cpu")


@pytest.fixture
def plain() -> Decoder:
    return build(PLAIN, TINY, "cpu")


# ---- decoders


def test_the_same_weights_each_time(decoder: Decoder) -> None:
    again = build(choose_code(PLAIN if isinstance(decoder, PlainDecoder) else None)[0], TINY, "cpu")
    pairs = list(zip(decoder.state_dict().values(), again.state_dict().values(), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}


@torch.inference_mode()
def test_tokens_one_by_one_are_the_prompt_at_once(decoder: Decoder) -> None:
    decoder.float()
    ids = torch.randint(TINY.vocab, (3, 9))
    whole = decoder(ids, decoder.cache(3, 12))
    assert whole.shape == (3, TINY.vocab)
    cache = decoder.cache(3, 12)
    decoder(ids[:, :5], cache)
    for i in range(5, 9):
        last = decoder(ids[:, i : i + 1], cache)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-6)
    cache.reset()
    decoder(ids[:, :8], cache)
    torch.testing.assert_close(decoder(ids[:, 8:], cache), whole, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_both_codes_compute_the_same() -> None:
    pytest.importorskip("transformers")
    theirs = build(choose_code("transformers")[0], TINY, "cpu").float()
    ours = build(PLAIN, TINY, "cpu").float()
    weights = {name.replace("model.model.", "").replace(".layer.", "."): t for name, t in theirs.state_dict().items()}
    weights = {name.replace("model.lm_head", "lm_head"): t for name, t in weights.items()}
    state = {"embed.weight": weights["embed_tokens.weight"], "norm.weight": weights["norm.weight"],
             "lm_head.weight": weights["lm_head.weight"]}  # fmt: skip
    for i in range(TINY.layers):
        each = {name.removeprefix(f"layers.{i}."): t for name, t in weights.items() if name.startswith(f"layers.{i}.")}
        heads = [each[f"self_attn.{name}_proj.weight"] for name in "qkv"]
        state |= {f"layers.{i}.layer.{name}.weight": t for name, t in {
            "qkv": torch.cat(heads), "out": each["self_attn.o_proj.weight"],
            "gate_up": torch.cat([each["mlp.gate_proj.weight"], each["mlp.up_proj.weight"]]),
            "down": each["mlp.down_proj.weight"], "input_norm": each["input_layernorm.weight"],
            "mlp_norm": each["post_attention_layernorm.weight"]}.items()}  # fmt: skip
    ours.load_state_dict(state)
    ids = torch.randint(TINY.vocab, (2, 7))
    torch.testing.assert_close(
        ours(ids, ours.cache(2, 8)), theirs(ids, theirs.cache(2, 8)), rtol=1e-4, atol=1e-6
    )  # fmt: skip


def test_variants_replace_the_linear_layers(decoder: Decoder) -> None:
    before = linears_of(decoder)
    dense = weight_bytes(decoder)
    assert dense == 2 * sum(m.weight.numel() for m in before.values())
    parse_variant("int4-g128").apply(decoder)
    after = linears_of(decoder)
    assert list(after) == list(before)
    assert {type(m) for m in after.values()} == {pyquant.nn.QuantLinear}
    assert type(decoder.head()) is torch.nn.Linear
    assert dense / 4 < weight_bytes(decoder) < dense / 3


def test_a_variant_is_a_name_or_a_format() -> None:
    assert parse_variant("bf16").spec is None
    assert parse_variant("marlin").label == "marlin"
    assert parse_variant("nf4-nested").label == "pyquant nf4-nested"
    with pytest.raises(ValueError, match=r"expected one of bf16, bnb_nf4, .*, or a format: .*int7"):
        parse_variant("int7")


@torch.inference_mode()
def test_modes_that_compile_do(decoder: Decoder) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    decoding = Decoding(decoder.float(), 2, 6, 5, "cpu")
    decoding.measure("eager")
    expected = decoding.token.clone()
    assert counters["stats"]["unique_graphs"] == 0
    decoding.measure("compile")
    assert counters["stats"]["unique_graphs"] == 2, "of a prompt and of a token, for all layers"
    assert not counters["graph_break"]
    assert torch.equal(decoding.token, expected), "the last of the tokens"


def test_the_parts_of_a_token(plain: Decoder) -> None:
    parse_variant("nf4").apply(plain)
    decoding = Decoding(plain, 1, 4, 4, "cpu")
    parts = time_of_parts(decoding)
    assert list(parts) == list(PARTS)
    assert all(ms > 0 for ms in parts.values())


def test_linear_layers_have_their_part(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred times the work in them is found there alone; counted, since times vary on a busy machine."""
    monkeypatch.setattr(model_parts, "_own_us", lambda event: 1.0)
    decoding = Decoding(plain, 1, 4, 4, "cpu")
    decoding.warm_up()
    before = time_of_parts(decoding)
    forward = torch.nn.Linear.forward

    def slow(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        for _ in range(100):
            y = forward(self, x)
        return y

    monkeypatch.setattr(torch.nn.Linear, "forward", slow)
    after = time_of_parts(decoding)
    more = {part: after[part] / before[part] for part in PARTS}
    assert more == pytest.approx({**dict.fromkeys(PARTS, 1), "linear": 100, "lm_head": 100}, rel=0.3), more


class Trace:
    """Events as torch.profiler gives them: on the host and on the GPU, us."""

    def __init__(self) -> None:
        self.events: list[FunctionEvent] = []

    def host(self, name: str, start: float, end: float, id: int = 0) -> None:
        self.events.append(FunctionEvent(id, name, 1, start, end))

    def kernel(self, launch: float, start: float, end: float, id: int, name: str = "gemm") -> None:
        self.host("cudaLaunchKernel", launch, launch + 1, id)
        self.events.append(FunctionEvent(id, name, 0, start, end, device_type=DeviceType.CUDA))

    def token(self, at: float, id: int, *, slow: float = 0) -> None:
        """Linear 20 us, attention 10, lm_head 30, another kernel 5."""
        self.host("pyquant range: step", at, at + 100)
        self.host("pyquant range: linear", at + 10, at + 20)
        self.kernel(at + 12, at + 200, at + 220 + slow, id)
        self.events.append(
            FunctionEvent(0, "pyquant range: linear", 0, at + 200, at + 220, device_type=DeviceType.CUDA)
        )
        self.host("aten::scaled_dot_product_attention", at + 30, at + 40)
        self.host("aten::_scaled_dot_product_flash_attention", at + 31, at + 39)
        self.kernel(at + 32, at + 300, at + 310, id + 1)
        self.host("pyquant range: lm_head", at + 50, at + 60)
        self.kernel(at + 52, at + 400, at + 430, id + 2)
        self.kernel(at + 70, at + 500, at + 505, id + 3)


EXPECTED = {"linear": 0.02, "lm_head": 0.03, "attention": 0.01, "elementwise": 0.005}


def test_kernels_belong_to_who_launched_them() -> None:
    trace = Trace()
    for i in range(3):
        trace.token(i * 1000, id=10 * i + 1)
    # Operators with the ids of launches, and calls of CUDA with the ids of operators: not the same numbers.
    trace.host("aten::mm", 0, 1, id=1)
    trace.host("cudaStreamIsCapturing", 71, 72, id=999)
    assert parts_of_kernels(trace.events) == pytest.approx(EXPECTED)


def test_overlapping_kernels_count_once() -> None:
    trace = Trace()
    for i in range(3):
        trace.token(i * 1000, id=10 * i + 1)
        # A dependent launch: it waits for the one before (200 to 220) and works 5 us longer.
        trace.kernel(i * 1000 + 14, i * 1000 + 205, i * 1000 + 225, id=10 * i + 9)
    assert parts_of_kernels(trace.events) == pytest.approx(EXPECTED | {"linear": 0.025})


def test_one_slow_token_does_not_count() -> None:
    trace = Trace()
    for i in range(3):
        trace.token(i * 1000, id=10 * i + 1, slow=50 if i == 0 else 0)
    assert parts_of_kernels(trace.events) == pytest.approx(EXPECTED)


def test_kernels_of_unknown_origin_are_an_error() -> None:
    trace = Trace()
    trace.token(0, id=1)
    trace.events = [e for e in trace.events if not (e.id == 1 and e.name == "cudaLaunchKernel")]
    with pytest.raises(RuntimeError, match=r"kernels of 0\.065 ms in 1 tokens, .* who launched 0\.020 ms"):
        parts_of_kernels(trace.events)
    with pytest.raises(RuntimeError, match=r"kernels of 0\.000 ms in 0 tokens"):
        parts_of_kernels([])


# ---- the logits


@pytest.mark.parametrize("spec", ["nf4", "int4-g128", "nf4-nested"])
def test_logits_are_those_of_the_dequantized_model(spec: str, decoder: Decoder) -> None:
    parse_variant(spec).apply(decoder)
    layers = linears_of(decoder)
    check, error = check_logits(decoder, 2, "cpu")
    assert check == "passed"
    assert error < 0.01
    assert linears_of(decoder) == layers, "the layers are back"


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_wrong_logits_are_incorrect(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pyquant.nn.QuantLinear.forward
    monkeypatch.setattr(pyquant.nn.QuantLinear, "forward", lambda self, x: forward(self, x) * factor)
    result = run(*CPU, "--batch", 1, "--variants", "nf4", "--modes", "eager", "--model-code", "plain")
    assert result.exit_code == 1
    assert "Error: pyquant nf4, batch 1, eager: incorrect, relative error of the logits" in result.stderr


# ---- the command


def test_a_run_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "model.csv"
    options = ("--batch", "1,3", "--variants", "nf4,bf16,marlin", "--modes", "eager", "--layers", 1)
    result = run(*CPU, *options, "--model-code", "plain", "--csv", path)
    assert result.exit_code == 0, result.output
    assert "marlin: not available because" in result.stderr
    for words in ("batch 1: ms per output token", "batch 3: ms of the prefill", "where a token's time goes", "plain"):
        assert words in result.stdout
    rows = list(csv.DictReader(path.open()))
    assert [(r["variant"], r["batch"]) for r in rows] == [
        ("bf16", "1"), ("bf16", "3"), ("pyquant nf4", "1"), ("pyquant nf4", "3")
    ]  # fmt: skip
    assert list(rows[0]) == [field.name for field in fields(ModelRow)]
    base, ours = rows[1], rows[3]
    assert float(ours["tpot_speedup"]) == pytest.approx(float(base["tpot_ms"]) / float(ours["tpot_ms"]), rel=0.01)
    assert float(ours["tokens_per_s"]) == pytest.approx(3000 / float(ours["tpot_ms"]), rel=0.01)
    assert (ours["check"], base["check"], ours["layers"], ours["mode"]) == ("passed", "", "1", "eager")
    assert 0 < float(ours["tpot_p10_ms"]) <= float(ours["tpot_p90_ms"])
    assert all(float(ours[f"{part}_ms"]) > 0 for part in PARTS)
    assert ours["gaps_ms"] == "", "operators of the CPU are no kernels"


def test_json_of_transformers_code() -> None:
    package = pytest.importorskip("transformers")
    options = ("--batch", 2, "--variants", "int4-g128", "--modes", "eager", "--no-verify", "--json")
    result = run(*CPU, *options)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert row["model_code"] == f"transformers {package.__version__}"
    assert (row["check"], row["tpot_speedup"], row["variant"]) == ("", None, "pyquant int4-g128")
    assert row["tpot_ms"] > 0


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = (*CPU, "--batch", 1, "--variants", "bf16", "--modes", "eager")
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert "note: without transformers, so with the model code of --model-code plain" in result.stderr
    assert "model code: plain" in result.stdout
    result = run(*options, "--model-code", "transformers")
    assert result.exit_code == 1
    assert "--model-code transformers: transformers cannot be imported" in result.stderr


def test_what_fails_has_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Decoding, mode: str) -> Any:
        raise RuntimeError(f"{mode} is made up\nmore")

    monkeypatch.setattr(Decoding, "measure", fail)
    path = tmp_path / "a.csv"
    options = (*CPU, "--batch", 1, "--model-code", "plain", "--csv", path)
    result = run(*options, "--variants", "nf4", "--modes", "eager,compile")
    assert result.exit_code == 1
    assert "pyquant nf4, batch 1, compile: failed: RuntimeError: compile is made up" in result.stderr
    assert "nothing could be measured" in result.stderr
    rows = list(csv.DictReader(path.open()))
    assert [(r["mode"], r["tpot_ms"]) for r in rows] == [("eager", ""), ("compile", "")]
    assert rows[0]["reason"] == "RuntimeError: eager is made up"


def test_what_the_profiler_cannot_do_leaves_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(decoding: Decoding) -> Any:
        raise KeyError("a library's hook")

    monkeypatch.setattr(measure, "time_of_parts", fail)
    options = ("--batch", 1, "--variants", "nf4", "--modes", "eager", "--model-code", "plain")
    result = run(*CPU, *options, "--json")
    assert result.exit_code == 0, result.output
    assert 'pyquant nf4, parts of a token: not available because KeyError: "a library\'s hook"' in result.stderr
    (row,) = json.loads(result.stdout)
    assert row["tpot_ms"] > 0
    assert row["linear_ms"] is None


class Peer(Provider):
    """Another library's layer: bf16 in disguise, of operators that take matrices only."""

    name = "marlin"

    def build(self, source: Source) -> Operand:
        def call(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            assert x.dim() == 2
            assert not torch.compiler.is_compiling()
            return torch.mm(x, weight.t())

        return Operand(source.w, call, source.w.nbytes, "bf16", None, lambda: source.w.float())


def test_layers_of_peers_run_in_every_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants._PROVIDERS, "marlin", Peer)
    result = run(*CPU, "--batch", 2, "--variants", "bf16,marlin", "--modes", "eager,compile", "--layers", 12,
                 "--model-code", "plain", "--json")  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(r["variant"], r["mode"], r["reason"]) for r in rows] == [
        ("bf16", "eager", ""), ("bf16", "compile", ""), ("marlin", "eager", ""), ("marlin", "compile", "")
    ]  # fmt: skip
    assert len({r["linear_bytes"] for r in rows}) == 1


def test_a_layer_of_a_peer_keeps_no_other_weight(plain: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Copies(Peer):
        def build(self, source: Source) -> Operand:
            return replace(super().build(source), weight=source.w.clone())

    monkeypatch.setitem(variants._PROVIDERS, "marlin", Copies)
    weights = [weakref.ref(m.weight) for m in linears_of(plain).values()]
    parse_variant("marlin").apply(plain)
    gc.collect()
    assert len(weights) == 8
    assert not any(weight() is not None for weight in weights)


def test_a_variant_that_breaks_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Peer):
        def build(self, source: Source) -> Operand:
            raise AttributeError("no such kernel")

    def broken(module: torch.nn.Linear, *arguments: Any, **options: Any) -> None:
        raise TypeError("no such layer")

    monkeypatch.setitem(variants._PROVIDERS, "marlin", Broken)
    path = tmp_path / "a.csv"
    options = (*CPU, "--batch", "1,2", "--modes", "eager", "--layers", 1, "--model-code", "plain")
    result = run(*options, "--variants", "bf16,marlin,nf4", "--csv", path)
    assert result.exit_code == 0, "not pyquant's failure"
    assert "marlin, batch 2, eager: failed: AttributeError: no such kernel" in result.stderr
    rows = list(csv.DictReader(path.open()))
    assert [(r["variant"], r["batch"], r["reason"], r["tpot_ms"] != "") for r in rows] == [
        ("bf16", "1", "", True), ("bf16", "2", "", True),
        ("marlin", "1", "AttributeError: no such kernel", False),
        ("marlin", "2", "AttributeError: no such kernel", False),
        ("pyquant nf4", "1", "", True), ("pyquant nf4", "2", "", True),
    ]  # fmt: skip
    monkeypatch.setattr(pyquant.nn.QuantLinear, "from_linear", broken)
    result = run(*options, "--variants", "bf16,nf4")
    assert result.exit_code == 1, "pyquant's own"
    assert "pyquant nf4, batch 1, eager: failed: TypeError: no such layer" in result.stderr


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure._measure_variant

    def interrupted(*arguments: Any) -> Iterator[Any]:
        yield next(iter(whole(*arguments)))
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "_measure_variant", interrupted)
    path = tmp_path / "a.csv"
    result = run(
        *CPU, "--batch", "1,2", "--variants", "bf16", "--modes", "eager", "--model-code", "plain", "--csv", path
    )
    assert result.exit_code == 130
    assert "interrupted: 1 of 2 cells were measured" in result.stderr
    assert len(list(csv.DictReader(path.open()))) == 1


@pytest.mark.parametrize(("variants", "rest"), [("nf4,bf16,int4-g128,uint4", "int4-g128,uint4"), ("bf16,nf4", "")])
def test_a_broken_gpu_says_what_is_left(variants: str, rest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure._measure_variant

    def broken(plan: Any, environment: Any, variant: Any, *arguments: Any) -> Iterator[Any]:
        if variant.name == "nf4":
            raise BrokenDevice("pyquant nf4: it is gone")
        yield from whole(plan, environment, variant, *arguments)

    monkeypatch.setattr(measure, "_measure_variant", broken)
    options = ("--batch", 1, "--variants", variants, "--modes", "eager", "--model-code", "plain", "--json")
    result = run(*CPU, *options)
    assert result.exit_code == 1
    assert [row["variant"] for row in json.loads(result.stdout)] == ["bf16"], "what was measured is reported"
    line = next(line for line in result.stderr.splitlines() if line.startswith("Error"))
    assert line == "Error: pyquant nf4: it is gone" + (f"; not measured: {rest}" if rest else "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = run("--model", "llama-3.1-8b")
    assert result.exit_code == 3
    assert "no NVIDIA GPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch", 1), "--batch needs --model"),
        (("--no-verify",), "needs --model"),
        ((*CPU, "--m", 1), "--m has no meaning with --model"),
        ((*CPU, "--report", "out"), "--report has no meaning with --model"),
        ((*CPU, "--modes", "graph"), "graph is not for --device cpu"),
        ((*CPU, "--variants", "int7"), "expected one of bf16"),
        (("--model", "gpt-2"), "--model"),
        (("--model", "llama-tiny", "--output", 1), "--output"),
        ((*CPU, "--csv", "no/such/folder.csv"), "expected a folder"),
    ],
)
def test_wrong_usage(arguments: tuple[object, ...], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("code", MODEL_CODES)
def test_every_mode_on_a_gpu(code: str) -> None:
    if code != PLAIN:
        pytest.importorskip("transformers")
    options = ("--input", 16, "--output", 16, "--batch", "1,4", "--variants", "bf16,nf4,int4-g128", "--json")
    result = run("--model", "llama-tiny", "--model-code", code, *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert len(rows) == 3 * 2 * 4
    assert all(row["tpot_ms"] > 0 and row["prefill_ms"] > 0 for row in rows)
    assert {row["check"] for row in rows if row["variant"] != "bf16"} == {"passed"}
    assert all(0 < row["weights_gb"] <= row["peak_gb"] for row in rows)
    eager = {(r["variant"], r["batch"]): r for r in rows if r["mode"] == "eager"}
    for row in (r for r in rows if r["mode"] == "graph"):
        kernels = [row[f"{part}_ms"] for part in PARTS]
        assert all(ms > 0 for ms in kernels)
        gaps = row["tpot_ms"] - sum(kernels)
        assert gaps > -0.1 * row["tpot_ms"]
        assert (row["gaps_ms"] or 0) == pytest.approx(max(0, gaps), abs=1e-3)
        assert row["tpot_ms"] < eager[row["variant"], row["batch"]]["tpot_ms"]
    assert {r["linear_ms"] for r in rows if r["mode"].startswith("compile")} == {None}
