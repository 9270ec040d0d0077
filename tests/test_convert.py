"""``pyquant convert``: whole checkpoints of every producer, in one file, in a folder, in shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from load_cases import Golden, golden
from safetensors.torch import load_file, save_file

from pyquant import QuantizedWeight, checkpoint, load
from pyquant.cli import convert as convert_module
from pyquant.cli import main
from pyquant.formats import FORMATS

INDEX = "model.safetensors.index.json"
# producer: quantization_config, settings of the golden cases that a checkpoint with this config may hold
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        {"bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, {"group_size": 32}),
    "hqq": ({"quant_method": "hqq"}, {"axis": 1, "bits": 4}),
    "compressed_tensors": ({"quant_method": "compressed-tensors", "config_groups": {}}, {}),
    "gpt_oss": ({"quant_method": "mxfp4"}, {}),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, {}),
    "torchao": ({"quant_method": "torchao"}, {}),
}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *(str(a) for a in arguments)])


def fits(case: Golden, settings: dict[str, Any]) -> bool:
    return all(case.settings.get(key) == value for key, value in settings.items())


def cases_of(producer: str) -> list[Golden]:
    return [case for case in golden(producer) if fits(case, CONFIGS[producer][1])]


def model_tensors(producer: str) -> dict[str, torch.Tensor]:
    """The golden layers of a producer and two ordinary tensors."""
    cases = cases_of(producer)
    tensors = {n: t for c in cases for n, t in c.tensors.items() if n.startswith((f"{c.name}.", f"{c.name}_"))}
    return tensors | {"model.norm.weight": torch.ones(64), "model.embed.weight": torch.randn(5, 8).half()}


def write_model(folder: Path, producer: str, shards: int) -> None:
    """A model folder. Tensors are dealt out one by one, so that layers are split over shards."""
    folder.mkdir()
    tensors = model_tensors(producer)
    config = {"model_type": "llama", "hidden_size": 64, "quantization_config": CONFIGS[producer][0]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def contents(folder: Path) -> dict[str, torch.Tensor | QuantizedWeight]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in checkpoint.load(file).items()}


def dequantized(content: dict[str, Any], module: str, dtype: torch.dtype) -> torch.Tensor:
    permutation = content.get(f"{module}.permutation")
    return load.LoadedLayer(content[f"{module}.weight"], None, permutation).dequantize(dtype)


def assert_converted(content: dict[str, Any], producer: str) -> None:
    assert torch.equal(content["model.norm.weight"], torch.ones(64))
    for case in cases_of(producer):
        if producer == "gpt_oss":
            for e, expected in enumerate(case.expected[torch.bfloat16]):
                assert torch.equal(dequantized(content, f"{case.name}.{e}", torch.bfloat16), expected)
                assert torch.equal(content[f"{case.name}.{e}.bias"], case.tensors[f"{case.name}_bias"][e])
        elif producer == "torchao":
            direct = load.torchao(case.tensors, case.name)
            assert torch.equal(dequantized(content, case.name, torch.float32), direct.dequantize())
        else:
            # HQQ's own rounding in half precision is not ours; see docs/loading.md.
            dtypes = [torch.float32] if producer == "hqq" else list(case.expected)
            assert all(torch.equal(dequantized(content, case.name, d), case.expected[d]) for d in dtypes), case
        bias = case.tensors.get(f"{case.name}.bias")
        assert bias is None or torch.equal(content[f"{case.name}.bias"], bias)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_what_a_producer_says_beside_the_config_is_not_copied(tmp_path: Path, name: str) -> None:
    """A server would take the converted weights for the producer's."""
    source, target = tmp_path / "in", tmp_path / "out"
    write_model(source, "gptq", 1)
    (source / name).write_text("{}")
    assert run(source, target).exit_code == 0
    assert not (target / name).exists()
    assert (target / "tokenizer.json").exists()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("producer", CONFIGS)
def test_folders(tmp_path: Path, producer: str, shards: int) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_model(source, producer, shards)
    result = run(source, target, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    content = contents(target)
    assert_converted(content, producer)

    config = json.loads((target / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == {"model_type": "llama", "hidden_size": 64}
    assert (quantization["quant_method"], quantization["version"]) == ("pyquant", 1)
    weights = {n.removesuffix(".weight"): w for n, w in content.items() if isinstance(w, QuantizedWeight)}
    assert quantization["modules"].keys() == weights.keys()
    for name, about in quantization["modules"].items():
        assert (about["format"], about["shape"]) == (weights[name].format.name, list(weights[name].shape))

    report = json.loads(result.stdout)
    assert [layer["name"] for layer in report["layers"]]
    assert report["converted_bytes"] == sum(f.stat().st_size for f in target.glob("*.safetensors"))
    assert (report["resumed"], report["dry_run"]) == (0, False)
    assert (target / "tokenizer.json").exists()
    assert (target / INDEX).exists() == (shards > 1)
    if shards > 1:
        index = json.loads((target / INDEX).read_text())["weight_map"]
        stored = {name: f.name for f in target.glob("*.safetensors") for name in checkpoint.Reader(f).stored_names}
        assert index == stored
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"], "temporary files are left"


def test_one_file_without_config(tmp_path: Path) -> None:
    save_file(model_tensors("bitsandbytes"), tmp_path / "in.safetensors")
    result = run(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    assert result.exit_code == 0, result.output
    assert_converted(checkpoint.load(tmp_path / "out.safetensors"), "bitsandbytes")
    assert "12 layers of bitsandbytes" in result.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "in", "gptq", 2)
    result = run(tmp_path / "in", tmp_path / "out", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert sorted(layer["name"] for layer in report["layers"]) == sorted(c.name for c in cases_of("gptq"))
    assert (report["producer"], report["converted_bytes"]) == ("gptq", None)
    assert "dry run" in run(tmp_path / "in", tmp_path / "out", "--dry-run").stdout
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


class Interrupt:
    """``save`` that is killed before the shard number ``after`` is written; counts calls."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.after, self.error, self.calls, self.save = after, error, 0, checkpoint.save

    def __call__(self, *arguments: Any) -> None:
        self.calls += 1
        if self.calls > self.after:
            raise self.error("stopped")
        self.save(*arguments)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    source, target, partial = tmp_path / "in", tmp_path / "out", tmp_path / ".out.partial"
    write_model(source, "bitsandbytes", 3)
    monkeypatch.setattr(convert_module, "save", Interrupt(2, error))
    assert run(source, target).exit_code == 1
    assert not target.exists()
    assert len(list(partial.glob("*.safetensors"))) == 2
    (partial / ".model-00003-of-00003.safetensors.0a1b2c3d.tmp").write_bytes(b"half of a shard")

    count = Interrupt(99, error)
    monkeypatch.setattr(convert_module, "save", count)
    result = run(source, target, "--json")
    assert result.exit_code == 0, result.output
    assert (count.calls, json.loads(result.stdout)["resumed"]) == (1, 2)
    assert_converted(contents(target), "bitsandbytes")
    assert len(json.loads((target / "config.json").read_text())["quantization_config"]["modules"]) == 12
    assert not partial.exists()
    assert [f.name for f in target.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("changed", ["input", "restart"])
def test_shards_of_another_input_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_model(source, "awq", 3)
    monkeypatch.setattr(convert_module, "save", Interrupt(2, KeyboardInterrupt))
    assert run(source, target).exit_code == 1
    options = ["--restart"] if changed == "restart" else []
    if changed == "input":
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"]["zero_point"] = True
        (source / "config.json").write_text(json.dumps(config))
    count = Interrupt(99, OSError)
    monkeypatch.setattr(convert_module, "save", count)
    result = run(source, target, *options, "--json")
    assert (count.calls, json.loads(result.stdout)["resumed"]) == (3, 0)
    assert_converted(contents(target), "awq")


def change_shard(folder: Path, name: str, function: Any, *, new_name: str = "", in_index: bool = True) -> None:
    """Replace one tensor of a model folder, and its name if there is a new one; None removes it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name not in tensors:
            continue
        changed = function(tensors.pop(name))
        kept = {} if changed is None else {new_name or name: changed}
        save_file(tensors | kept, file)
        index = json.loads((folder / INDEX).read_text())
        if in_index:
            del index["weight_map"][name]
            index["weight_map"] |= dict.fromkeys(kept, file.name)
        (folder / INDEX).write_text(json.dumps(index))


def change_config(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change_shard(f, "nf4.weight.absmax", lambda t: t * float("nan")),
            "nf4.weight.absmax: expected finite values, got NaN or Inf: damaged; download the model or quantize it "
            "again; layer nf4 of model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, "
            "model-00003-of-00003.safetensors, nothing was converted",
        ),
        (lambda f: change_shard(f, "nf4.weight", lambda t: t[:-2]), "nf4.weight: expected 256 bytes"),
        (lambda f: change_shard(f, "nf4.weight.quant_map", lambda t: None), "nf4.weight.quant_map: expected a tensor"),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
            "expected 3 shards beside it, missing: model-00002-of-00003.safetensors; download or copy them again",
        ),
        (
            lambda f: change_shard(f, "model.norm.weight", lambda t: None, in_index=False),
            "does not fit the shards: model.norm.weight; download or save the model again",
        ),
        (
            lambda f: change_shard(f, "nf4.weight.quant_state.bitsandbytes__nf4", lambda t: None),
            "nf4.weight.absmax: expected nf4.weight.quant_state.bitsandbytes__nf4 beside it, got none",
        ),
        (
            lambda f: change_shard(f, "model.norm.weight", lambda t: t, new_name="other.qweight"),
            "other.qweight: expected a tensor of bitsandbytes or of no quantized layer; checkpoints of mixed formats",
        ),
        (
            lambda f: (f / "model-00002-of-00003.safetensors").write_bytes(b"x" * 99),
            "no safetensors file, or a truncated",
        ),
        (lambda f: (f / INDEX).write_text("{}"), "no valid index of shards"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: no valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: expected a JSON object, got list"),
        (
            lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "aqlm"}}'),
            "quant_method: expected one of bitsandbytes, gptq",
        ),
        (
            lambda f: (f / "config.json").write_text('{"quantization_config": 4}'),
            "quantization_config: expected an object",
        ),
    ],
)
def test_bad_checkpoints_leave_nothing(tmp_path: Path, damage: Any, message: str) -> None:
    write_model(tmp_path / "in", "bitsandbytes", 3)
    damage(tmp_path / "in")
    result = run(tmp_path / "in", tmp_path / "out")
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (1, 1), result.output
    assert lines[0].startswith("Error: ")
    assert message in lines[0]
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


MEGABYTE = 1 << 20
PEAK = """
import sys
from pyquant.cli import main
main(["convert", *sys.argv[1:]], standalone_mode=False)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def write_large_model(folder: Path, shards: int, layers: int, megabytes: int, copied: int) -> None:
    """Shards of nf4 layers, each with so many megabytes of codes; the last one also has an ordinary tensor."""
    folder.mkdir()
    n, k, weight_map = megabytes * 2048, 1024, {}
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    for i in range(shards):
        tensors = {"model.embed.weight": torch.zeros(copied * MEGABYTE // 2).half()} if i == shards - 1 else {}
        for j in range(layers):
            name = f"layers.{i}.{j}"
            tensors |= {
                f"{name}.weight": torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8),
                f"{name}.weight.absmax": torch.ones(n * k // 64),
                f"{name}.weight.quant_map": torch.tensor(FORMATS["nf4"].codebook),
                f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(json.dumps(state).encode()), dtype=torch.uint8
                ),
            }
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_is_at_most_two_shards(tmp_path: Path) -> None:
    write_large_model(tmp_path / "small", shards=1, layers=1, megabytes=1, copied=1)
    write_large_model(tmp_path / "large", shards=3, layers=8, megabytes=8, copied=160)
    peaks = {}
    for name in ("small", "large"):
        command = [sys.executable, "-c", PEAK, str(tmp_path / name), str(tmp_path / f"{name}-out")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1]) * 1024
    # A shard has 72 MB of codes and scales. What the interpreter and torch take is in the small one too.
    assert peaks["large"] - peaks["small"] <= 2 * 72 * MEGABYTE
    assert (tmp_path / "large-out" / INDEX).exists()


def with_split_k(folder: Path) -> None:
    """An act-order layer whose K was split: 96 inputs of 3 groups, of which a rank has the first 64."""
    layer = "v2_asym_act_order"
    change_shard(folder, f"{layer}.qweight", lambda t: t[: 64 // 8].contiguous())
    change_shard(folder, f"{layer}.g_idx", lambda t: t[:64].contiguous())


@pytest.mark.parametrize(
    ("producer", "damage", "message"),
    [
        (
            "gptq",
            with_split_k,
            "v2_asym_act_order.g_idx: act-order with split K: 64 inputs that take their scales from 3 groups of 32; "
            "convert the whole checkpoint, and split it along N; layer v2_asym_act_order of model-0000",
        ),
        (
            "gptq",
            lambda f: change_config(f, dynamic={"-:lm_head": {}, "+:.*down.*": {"bits": 8}}),
            "dynamic: expected no settings of single layers, got '+:.*down.*'",
        ),
        ("gptq", lambda f: change_config(f, group_size="32"), "group_size: expected a number or -1 for K, got '32'"),
        ("gptq", lambda f: change_config(f, bits="4"), "bits: expected 2, 3, 4 or 8, got '4'"),
        ("awq", lambda f: change_config(f, group_size=0), "group_size: expected a number or -1 for K, got 0"),
        (
            "gptq",
            lambda f: change_shard(f, "model.norm.weight", lambda t: t, new_name="v2_sym.weight"),
            "v2_sym.weight: expected none beside v2_sym.qweight: a layer is quantized or it is not; remove one of them",
        ),
        (
            "compressed_tensors",
            lambda f: change_config(f, config_groups=[{"weights": {}}]),
            "config_groups: expected an object of objects, got [{'weights': {}}]",
        ),
    ],
)
def test_what_no_layer_can_be_made_of_is_refused(tmp_path: Path, producer: str, damage: Any, message: str) -> None:
    write_model(tmp_path / "in", producer, 3)
    damage(tmp_path / "in")
    result = run(tmp_path / "in", tmp_path / "out")
    lines = result.stderr.splitlines()
    assert (result.exit_code, len(lines)) == (1, 1), result.output
    assert message in lines[0]
    assert [f.name for f in tmp_path.iterdir()] == ["in"]


def test_targets_and_sources_that_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "in", "awq", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("kept")
    result = run(tmp_path / "in", tmp_path / "out")
    assert (result.exit_code, "use --overwrite" in result.stderr) == (2, True)
    assert run(tmp_path / "in", tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "file").read_text() == "kept"
    assert run(tmp_path / "in", tmp_path / "in").exit_code == 2
    again = run(tmp_path / "out", tmp_path / "again")
    assert (again.exit_code, "is a pyquant checkpoint already" in again.stderr) == (1, True)
    save_file({"w.weight": torch.ones(4, 4)}, tmp_path / "plain.safetensors")
    plain = run(tmp_path / "plain.safetensors", tmp_path / "x.safetensors")
    assert (plain.exit_code, "expected quantized layers" in plain.stderr) == (1, True)


def test_help_has_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "pyquant convert ./llama-bnb-4bit ./llama-pyquant" in result.stdout
