"""``pyquant convert``: whole checkpoints of every producer, in one file, in a folder, in shards."""

from __future__ import annotations

import json
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


def change_shard(folder: Path, name: str, function: Any) -> None:
    """Replace one tensor of a model folder; None removes it."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = function(tensors.pop(name))
            save_file(tensors if changed is None else tensors | {name: changed}, file)
            if changed is None:
                index = json.loads((folder / INDEX).read_text())
                del index["weight_map"][name]
                (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: change_shard(f, "nf4.weight.absmax", lambda t: t * float("nan")),
            "nf4.weight.absmax: expected finite",
        ),
        (lambda f: change_shard(f, "nf4.weight", lambda t: t[:-2]), "nf4.weight: expected 256 bytes"),
        (lambda f: change_shard(f, "nf4.weight.quant_map", lambda t: None), "nf4.weight.quant_map: expected a tensor"),
        (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors: no such file"),
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


def test_gptq_settings_of_single_layers_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "in", "gptq", 1)
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {"-:lm_head": {}, "+:.*down.*": {"bits": 8}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    result = run(tmp_path / "in", tmp_path / "out")
    assert result.exit_code == 1
    assert r"dynamic: expected no settings of single layers, got '+:.*down.*'" in result.stderr


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
