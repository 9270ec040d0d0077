"""The command line, end to end: what it writes, prints and returns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from pyquant import QuantizedWeight, checkpoint, quantize
from pyquant.cli import main
from pyquant.cli.selection import Selection
from pyquant.formats import FORMATS

COMMANDS = ("quantize", "convert", "verify", "bench", "info")
FORMAT_NAMES = [name for name, row in FORMATS.items() if not row.needs_codebook]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def fails_clearly(result: Result, *words: str) -> bool:
    """Exit code 1, and one error line with the words on stderr."""
    lines = result.stderr.splitlines()
    return result.exit_code == 1 and len(lines) == 1 and all(w in lines[0] for w in ("Error: ", *words))


def model_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embeddings.word.weight": torch.randn(50, 64),
        "layers.0.attention.weight": torch.randn(64, 64),
        "layers.0.attention.bias": torch.randn(64),
        "layers.1.mlp.weight": torch.randn(96, 64, dtype=torch.bfloat16),
        "layers.1.norm.weight": torch.ones(64),
        "conv.weight": torch.randn(4, 3, 3),
        "steps.weight": torch.ones(64, 64, dtype=torch.int64),
        "lm_head.weight": torch.randn(50, 64),
    }


LAYERS = ["layers.0.attention.weight", "layers.1.mlp.weight"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(model_tensors(), path, metadata={"format": "pt"})
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model folder with two shards, their index, and other files."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    names = sorted(model_tensors())
    weight_map = {}
    for i, part in enumerate((names[:4], names[4:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: model_tensors()[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    (folder / "onnx" / "model.onnx").write_bytes(b"weights")
    return folder


def shard_contents(folder: Path) -> dict[str, torch.Tensor | QuantizedWeight]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in checkpoint.load(file).items()}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_quantize_then_verify(model: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out.safetensors"
    result = run("quantize", model, out, "--format", name)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # progress is for terminals
    content, original = checkpoint.load(out), load_file(model)
    assert content.keys() == original.keys()
    for key, tensor in original.items():
        if key in LAYERS:
            assert content[key].format.name == name
            assert torch.equal(content[key].codes, quantize(tensor, name).codes)
        else:
            assert torch.equal(content[key], tensor)
    with checkpoint.Reader(out) as reader:
        assert reader.metadata["format"] == "pt"
    assert run("verify", out, model).exit_code == 0


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        (("--nested", "--group-size", "128"), {"group_size": 128, "scale_type": "NESTED"}),
        (("--format", "int8", "--group-size", "-1"), {"group_size": 64}),
        (("--format", "uint4", "--method", "hqq"), {"zero_type": "FLOAT"}),
        (("--format", "uint4", "--zero-type", "float", "--scale-type", "fp16"), {"scale_type": "FP16"}),
    ],
)
def test_quantize_options(model: Path, tmp_path: Path, options: tuple[str, ...], attributes: dict) -> None:
    result = run("quantize", model, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    weight = checkpoint.load(tmp_path / "out")["layers.0.attention.weight"]
    for name, value in attributes.items():
        got = getattr(weight, name)
        assert getattr(got, "name", got) == value


def test_quantize_summary_and_json(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    text = run("quantize", model, out)
    for word in (
        *LAYERS,
        "2 layers in nf4",
        "6 tensors copied",
        "bits per weight",
        "linear layers",
        "whole file",
    ):
        assert word in text.stdout
    result = run("quantize", model, out, "--json", "--overwrite")
    report = json.loads(result.stdout)
    assert report.keys() == {
        "input", "output", "format", "dry_run", "layers", "copied", "bytes", "quantized_bytes",
    }  # fmt: skip
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert report["quantized_bytes"] == out.stat().st_size
    assert report["bytes"] == model.stat().st_size
    for layer in report["layers"]:
        assert layer.keys() == {"name", "shape", "bytes", "quantized_bytes", "bits_per_weight"}
        weight = checkpoint.load(out)[layer["name"]]
        assert (layer["quantized_bytes"], layer["bits_per_weight"]) == (weight.nbytes, weight.bits_per_weight)


def test_output_is_deterministic(model: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("quantize", model, tmp_path / name, "--nested").exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_dry_run_writes_nothing(model: Path, tmp_path: Path) -> None:
    result = run("quantize", model, tmp_path / "out", "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert report["dry_run"]
    assert report["quantized_bytes"] is None
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert "nothing was written" in run("quantize", model, tmp_path / "out", "--dry-run").stdout
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), LAYERS),
        (("--exclude", "*.mlp.*"), LAYERS[:1]),
        (("--include", "lm_head.*"), ["lm_head.weight"]),
        (("--include", "*"), ["embeddings.word.weight", *LAYERS, "lm_head.weight"]),
        (("--include", "*", "--exclude", "lay*", "--exclude", "emb*"), ["lm_head.weight"]),
    ],
)
def test_selection(model: Path, tmp_path: Path, options: tuple[str, ...], expected: list[str]) -> None:
    report = json.loads(run("quantize", model, tmp_path / "out", "--dry-run", "--json", *options).stdout)
    assert sorted(layer["name"] for layer in report["layers"]) == sorted(expected)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "model.embed_tokens.weight",
        "shared.weight",
        "x.LayerNorm.weight",
        "lm_head.weight",
        # Routers: Mixtral and PhiMoE; Qwen and DeepSeek; Qwen2; HunYuan; gpt-oss; Granite; Llama 4; DBRX; Switch; Ling.
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.shared_expert_gate.weight",
        "model.layers.0.mlp.gate.wg.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.block_sparse_moe.router.layer.weight",
        "language_model.model.layers.0.feed_forward.router.weight",
        "transformer.blocks.0.ffn.router.layer.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
        "model.layers.1.feed_forward.gate.weight",
    ],
)
def test_default_excludes(name: str) -> None:
    assert not Selection().picks(name, torch.ones(2, 2))
    assert Selection(include=(name,)).picks(name, torch.ones(2, 2))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
        "model.layers.0.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.mlp.shared_expert.gate_proj.weight",
        "rwkv.blocks.0.attention.gate.weight",
    ],
)
def test_gates_that_are_no_routers(name: str) -> None:
    assert Selection().picks(name, torch.ones(2, 2))


def test_sharded_folder(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", sharded, out, "--json")
    assert result.exit_code == 0, result.output
    assert {f.name for f in out.iterdir()} - {"onnx"} == {f.name for f in sharded.iterdir()} - {
        "onnx",
        "pytorch_model.bin",
    }
    assert not list(out.rglob("*.onnx"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {n: f.name for f in out.glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in out.glob("*.safetensors") for t in load_file(f).values()
    )
    report = json.loads(run("verify", out, sharded, "--json").stdout)
    assert report["ok"]
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    assert json.loads(run("info", out, "--json").stdout)["checked"]
    assert not list(tmp_path.glob(".*"))
    # again, over what is there
    (out / "notes.txt").write_text("mine")
    assert run("quantize", sharded, out).exit_code == 2
    before = shard_contents(out)[LAYERS[0]]
    assert run("quantize", sharded, out, "--format", "int4", "--overwrite").exit_code == 0
    assert before.format.name == "nf4"
    assert shard_contents(out)[LAYERS[0]].format.name == "int4"
    assert (out / "notes.txt").read_text() == "mine"
    assert run("verify", out, sharded).exit_code == 0


def test_single_file_folder(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    assert run("quantize", folder, tmp_path / "out").exit_code == 0
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert run("verify", tmp_path / "out", folder).exit_code == 0


def test_folder_with_other_weights_is_refused(sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"other")
    result = run("quantize", sharded, out, "--overwrite")
    assert fails_clearly(result, "model.safetensors"), result.output
    assert [f.name for f in out.iterdir()] == ["model.safetensors"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        "{}",
        "[" * 99999,
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": {"a": "missing.safetensors"}}',
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    ],
)
def test_bad_index(sharded: Path, tmp_path: Path, index: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    result = run("quantize", sharded, tmp_path / "out")
    assert fails_clearly(result), result.output
    assert not (tmp_path / "out").exists()


def test_verify_report(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", model, out, "--format", "int8")
    text = run("verify", out, model)
    assert "SQNR dB" in text.stdout
    assert "ok: 2 layers compared, 6 copied tensors equal" in text.stdout
    report = json.loads(run("verify", out, model, "--json").stdout)
    assert report.keys() == {"quantized", "original", "ok", "problems", "layers", "total"}
    assert report["total"].keys() == {
        "sqnr_db", "max_abs_error", "relative_error", "bits_per_weight", "copied",
    }  # fmt: skip
    for layer in report["layers"]:
        assert layer.keys() == {
            "name", "format", "shape", "sqnr_db", "max_abs_error", "relative_error", "bits_per_weight",
        }  # fmt: skip
        w = load_file(model)[layer["name"]].double()
        error = w - checkpoint.load(out)[layer["name"]].dequantize().double()
        sqnr = 10 * torch.log10(w.square().sum() / error.square().sum())
        assert layer["sqnr_db"] == pytest.approx(sqnr.item(), rel=1e-5)
        assert layer["max_abs_error"] == pytest.approx(error.abs().max().item(), rel=1e-5)
        assert layer["relative_error"] == pytest.approx((error.norm() / w.norm()).item(), rel=1e-5)


def changed(path: Path, **changes: torch.Tensor | QuantizedWeight | None) -> None:
    content = checkpoint.load(path) | {name.replace("__", "."): value for name, value in changes.items()}
    checkpoint.save(path, {name: value for name, value in content.items() if value is not None})


def test_verify_fails(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", model, out)
    assert run("verify", out, model, "--min-sqnr", "15").exit_code == 0
    low = run("verify", out, model, "--min-sqnr", "30", "--json")
    report = json.loads(low.stdout)
    assert low.exit_code == 1
    assert not report["ok"]
    assert len(report["problems"]) == 2
    assert "expected at least 30 dB" in low.stderr

    cases = [
        ({"layers__0__attention__weight": None}, "missing in the original"),
        ({"layers__0__attention__weight": torch.ones(64, 32)}, "shape"),
        ({"layers__0__attention__weight": torch.full((64, 64), torch.nan)}, "NaN"),
        ({"extra": torch.ones(1)}, "extra: missing in the quantized"),
        ({"layers__0__attention__bias": torch.ones(64)}, "differs"),
    ]
    for changes, message in cases:
        other = tmp_path / "other"
        other.write_bytes(model.read_bytes())
        changed(other, **changes)
        result = run("verify", out, other)
        assert result.exit_code == 1, message
        assert message in result.stderr
        assert "Traceback" not in result.output
    assert run("verify", model, model).exit_code == 1  # nothing is quantized
    assert run("verify", out, out).exit_code == 1
    changed(out, layers__0__attention__weight=None, layers__1__mlp__weight=None)
    assert run("verify", out, model).exit_code == 1


def test_verify_exact_layer(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(64, 64)}, tmp_path / "in")
    assert run("quantize", tmp_path / "in", tmp_path / "out").exit_code == 0
    result = run("verify", tmp_path / "out", tmp_path / "in", "--json", "--min-sqnr", "100")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["layers"][0]["sqnr_db"] is None


def test_info_of_a_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", model, out, "--nested")
    text = run("info", out)
    assert text.exit_code == 0
    for word in (*LAYERS, "nested", "6 other tensors", "checksums match"):
        assert word in text.stdout
    report = json.loads(run("info", out, "--json").stdout)
    assert report.keys() == {"file", "checked", "bytes", "layers", "tensors"}
    assert report["layers"][0].keys() == {
        "name", "format", "shape", "group_size", "scale_type", "zero_type", "bytes", "bits_per_weight",
    }  # fmt: skip
    assert report["tensors"][0].keys() == {"name", "dtype", "shape", "bytes"}
    assert "no checksums" in run("info", model).stdout


def test_info_of_the_installation() -> None:
    text = run("info")
    assert text.exit_code == 0, text.output
    report = json.loads(run("info", "--json").stdout)
    assert report.keys() == {
        "pyquant", "torch", "python", "cpu", "cuda", "library", "instances", "formats",
    }  # fmt: skip
    assert [row["name"] for row in report["formats"]] == list(FORMATS)
    assert any(row["device"] == "cpu" and row["available"] for row in report["instances"])
    for word in (torch.__version__, *FORMATS, *(row["name"] for row in report["instances"])):
        assert word in text.stdout


def test_damaged_file(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", model, out)
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    for arguments in (("info", out), ("verify", out, model), ("quantize", out, tmp_path / "new")):
        result = run(*arguments)
        assert fails_clearly(result, str(out)), result.output
    model.write_bytes(model.read_bytes()[:-5])
    result = run("quantize", model, tmp_path / "new")
    assert fails_clearly(result, "truncated", str(model)), result.output
    assert not (tmp_path / "new").exists()


def test_bad_data(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for tensors, words in (
        ({"a.weight": torch.full((64, 64), torch.nan)}, ("a.weight: ", "NaN")),
        ({"a.bias": torch.ones(64)}, ("no tensor to quantize",)),
    ):
        save_file(tensors, source)
        result = run("quantize", source, out)
        assert fails_clearly(result, *words), result.output
    save_file(model_tensors(), source)
    run("quantize", source, out)
    again = run("quantize", out, tmp_path / "again")
    assert again.exit_code == 1
    assert "quantized already" in again.stderr
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]


def test_usage_errors(model: Path, sharded: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"here")
    for arguments in (
        ("quantize",),
        ("quantize", tmp_path / "none", tmp_path / "new"),
        ("quantize", model, tmp_path / "new", "--format", "int7"),
        ("quantize", model, tmp_path / "new", "--format", "codebook4"),
        ("quantize", model, tmp_path / "new", "--group-size", "48"),
        ("quantize", model, tmp_path / "new", "--group-size", "0"),
        ("quantize", model, tmp_path / "new", "--format", "int4", "--nested"),
        ("quantize", model, tmp_path / "new", "--method", "hqq"),
        ("quantize", model, tmp_path / "new", "--zero-type", "float"),
        ("quantize", model, tmp_path / "new", "--device", "nowhere"),
        ("quantize", model, tmp_path / "none" / "new"),
        ("quantize", model, model, "--overwrite"),
        ("quantize", model, out),
        ("quantize", model, sharded, "--overwrite"),
        ("quantize", sharded, out, "--overwrite"),
        ("quantize", sharded, sharded / "inside"),
        ("verify", model),
        ("verify", model, tmp_path / "none"),
        ("info", tmp_path / "none"),
        ("unknown",),
        ("--unknown",),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert "Error: " in result.stderr, arguments
        assert result.stdout == ""
    assert out.read_bytes() == b"here"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)])
def test_help_has_examples(command: tuple[str, ...]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Examples:\n" in result.stdout
    assert "  pyquant " in result.stdout


def test_as_a_program(model: Path, tmp_path: Path) -> None:
    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pyquant", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    out = tmp_path / "out.safetensors"
    done = program("quantize", model, out, "--nested", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["format"] == "nf4"
    assert program("verify", out, model, "--min-sqnr", "99").returncode == 1
    out.write_bytes(b"x" * 100)
    bad = program("info", out)
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert program("quantize", model).returncode == 2


def test_torch_ops() -> None:
    path = Path(run("--torch-ops").stdout.strip())
    assert path.is_file()
    assert path in map(Path, torch.ops.loaded_libraries)


def test_folders_for_cmake() -> None:
    prefix, include = (Path(run(option).stdout.strip()) for option in ("--cmake-prefix", "--include"))
    assert (prefix / "__init__.py").is_file()
    assert include == prefix / "include"
    if (prefix / "lib").is_dir():
        assert (prefix / "lib" / "cmake" / "cutlass_ext").is_dir()
        assert (include / "cutlass_ext" / "cutlass_ext.h").is_file()
