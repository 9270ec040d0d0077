"""Bad input to ``pyquant.hf``: messages that name the parameter and say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import CONFIGS, edit_config, model_class, save_dense, transformers
from safetensors.torch import load_file, save_file

from pyquant.hf import PyquantConfig

Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    """A quantized Llama on disk."""
    return save_quantized(tmp_path, "llama")


def save_quantized(tmp_path: Path, name: str) -> Path:
    save_dense(tmp_path / "dense", name)
    config = PyquantConfig("nf4", nested=True)
    model_class(name).from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def change_tensors(folder: Path, function: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    function(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_module(folder: Path, name: str, **changes: Any) -> None:
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    modules[name] |= changes
    edit_config(folder, {"modules": modules})


# ---- PyquantConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(format="nf5"), r"PyquantConfig: format: expected one of nf4, .*, got 'nf5'"),
        (dict(format="nf4", group_size=48), r"PyquantConfig: group_size: nf4 expects 32 or 64 .*, got 48"),
        (dict(format="int4", nested=True), r"PyquantConfig: scale_type: int4 expects one of .*, got nested"),
        (dict(format="nf4", method="hqq"), r"PyquantConfig: method 'hqq' expects a format with float zeros, got nf4"),
        (dict(format="codebook4"), r"PyquantConfig: codebook: codebook4 expects \[16\] values, got none"),
        (dict(version=2), r"version: expected 1, got 2; .* upgrade pyquant"),
        (dict(quant_method="gptq"), r"quant_method: expected 'pyquant', got 'gptq'"),
        (dict(modules={"a.b": {"format": "nf5", "shape": [1, 2]}}), r"modules: a\.b: format: expected one of .*'nf5'"),
        (
            dict(modules={"a.b": {"format": "nf4"}}),
            r"modules: a\.b: expected format, shape \[N, K\], group_size, scale",
        ),
    ],
)
def test_config_values(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PyquantConfig(**arguments)


def test_config_types() -> None:
    with pytest.raises(TypeError, match="expected no entry called 'bits'"):
        PyquantConfig("nf4", bits=4)
    with pytest.raises(TypeError, match="modules_to_not_convert: expected a list, got 'lm_head'"):
        PyquantConfig("nf4", modules_to_not_convert="lm_head")


@pytest.mark.parametrize("hidden", ["transformers", "transformers.core_model_loading"])
def test_without_transformers(hidden: str) -> None:
    """None at all, or one from before its loader had operations."""
    code = f"import sys; sys.modules[{hidden!r}] = None; import pyquant.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: pyquant.hf: expected transformers 5.23 or newer" in done.stderr
    assert "pip install 'pyquant[hf]'" in done.stderr


# ---- quantizing while loading


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (["lm_head", "q_porj"], r"modules_to_not_convert: 'q_porj' names no layer of Llama.*; did you mean 'q_proj'"),
        (["mlp"], r"modules_to_not_convert: 'mlp' names no layer of LlamaForCausalLM; did you mean '\.\*\\\\\.mlp'\?"),
        (["xyz"], r"modules_to_not_convert: 'xyz' names no layer of LlamaForCausalLM$"),
        ([".*"], r"LlamaForCausalLM has no weight to quantize: 15 weights of linear layers"),
    ],
)  # fmt: skip
def test_skip_lists(tmp_path: Path, skip: list[str], message: str) -> None:
    save_dense(tmp_path, "llama")
    with pytest.raises(ValueError, match=message):
        model_class("llama").from_pretrained(
            tmp_path, quantization_config=PyquantConfig("nf4", modules_to_not_convert=skip)
        )


def test_a_group_size_that_fits_one_layer_only(tmp_path: Path) -> None:
    """64 would fit all; 96 is K of the down projection alone."""
    save_dense(tmp_path, "llama")
    message = (
        r"PyquantConfig: model\.layers\.0\.self_attn\.q_proj\.weight, K=64: group_size: int4 expects .*, got 96 .*"
        "choose another group_size, or add the module to modules_to_not_convert"
    )
    with pytest.raises(ValueError, match=message):
        model_class("llama").from_pretrained(tmp_path, quantization_config=PyquantConfig("int4", group_size=96))


def test_weights_that_cannot_be_quantized(tmp_path: Path) -> None:
    save_dense(tmp_path, "llama")
    change_tensors(tmp_path, lambda tensors: tensors[f"{Q}.weight"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: quantize: w: expected finite values, got NaN or Inf"):
        model_class("llama").from_pretrained(tmp_path, quantization_config=PyquantConfig("nf4"))


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    save_dense(tmp_path, "llama")
    change_tensors(tmp_path, lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(64, 32)}))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: expected shape \[64, 64\], got \[64, 32\]"):
        model_class("llama").from_pretrained(tmp_path, quantization_config=PyquantConfig("nf4"))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"model": 0, "lm_head": "cpu"}, "device_map: 'lm_head' would be offloaded to cpu, .* not support"),
        ({"": "disk"}, "device_map: '' would be offloaded to disk, .* not support"),
    ],
)
def test_offloading(tmp_path: Path, device_map: dict[str, Any], message: str) -> None:
    pytest.importorskip("accelerate")
    save_dense(tmp_path, "llama")
    with pytest.raises(ValueError, match=message):
        model_class("llama").from_pretrained(tmp_path, quantization_config=PyquantConfig("nf4"), device_map=device_map)


# ---- quantized checkpoints


@pytest.mark.parametrize(
    "part", ["codes", "scales", "quant_spec", "nested_map", "nested_absmax", "nested_offset"]
)  # fmt: skip
def test_a_missing_tensor(quantized: Path, part: str) -> None:
    change_tensors(quantized, lambda tensors: tensors.pop(f"{Q}.weight.{part}"))
    with pytest.raises(ValueError, match=rf"{Q}\.weight\.{part}.*the checkpoint is incomplete: download or convert it"):
        model_class("llama").from_pretrained(quantized)


def test_a_missing_layer_of_a_state_dict(quantized: Path) -> None:
    """Given in memory, names are seen only while they are loaded."""
    tensors = {n: t for n, t in load_file(quantized / "model.safetensors").items() if not n.startswith(Q)}
    config = transformers.AutoConfig.from_pretrained(quantized)
    with pytest.raises(ValueError, match=rf"{Q}\.weight: expected a quantized weight in the checkpoint, got none"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors)


def test_a_missing_expert(tmp_path: Path) -> None:
    folder = save_quantized(tmp_path, "mixtral")
    name = "model.layers.0.block_sparse_moe.experts.down_proj.2"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[key]

    change_tensors(folder, drop)
    message = (
        r"model\.layers\.0\.mlp\.experts\.down_proj: expected 4 quantized weights .* got 3; missing is .*down_proj\.2\."
    )
    with pytest.raises(ValueError, match=message):
        model_class("mixtral").from_pretrained(folder)


def test_another_shape_in_config_json(quantized: Path) -> None:
    change_module(quantized, Q, shape=[64, 128])
    with pytest.raises(
        ValueError, match=rf"{Q}: expected weights of \[N, K\] = \[64, 64\] for {Q}\.weight, got 1 with"
    ):
        model_class("llama").from_pretrained(quantized)


def test_a_tensor_of_another_shape(quantized: Path) -> None:
    change_tensors(quantized, lambda tensors: tensors.update({f"{Q}.weight.codes": torch.zeros(64, 8).byte()}))
    with pytest.raises(
        ValueError,
        match=rf"{Q}\.weight: QuantizedWeight: codes: expected torch.uint8 \[64, 32\], got torch.uint8 \[64, 8\]",
    ):
        model_class("llama").from_pretrained(quantized)


@pytest.mark.parametrize("part", ["nested_absmax", "nested_map"])
def test_scales_that_are_no_numbers(quantized: Path, part: str) -> None:
    change_tensors(quantized, lambda tensors: tensors[f"{Q}.weight.{part}"].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: scales: expected finite values, got NaN or Inf"):
        model_class("llama").from_pretrained(quantized)


def test_act_order_that_is_no_order(quantized: Path) -> None:
    change_tensors(quantized, lambda tensors: tensors.update({f"{Q}.permutation": torch.zeros(64, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: QuantLinear: permutation: expected every number from 0 to 63"):
        model_class("llama").from_pretrained(quantized)


def test_a_damaged_spec(quantized: Path) -> None:
    change_tensors(quantized, lambda tensors: tensors.update({f"{Q}.weight.quant_spec": torch.tensor(1)}))
    with pytest.raises(ValueError, match=rf"{Q}\.weight: quant_spec: expected int64 \[7\], got torch.int64 \[\]"):
        model_class("llama").from_pretrained(quantized)


def test_another_format_in_config_json(quantized: Path) -> None:
    change_module(quantized, Q, group_size=128)
    with pytest.raises(ValueError, match=rf"{Q}\.weight: config.json says .*128.*, the tensors .*64"):
        model_class("llama").from_pretrained(quantized)


def test_a_layer_that_config_json_does_not_know(quantized: Path) -> None:
    modules = json.loads((quantized / "config.json").read_text())["quantization_config"]["modules"]
    del modules[Q]
    edit_config(quantized, {"modules": modules})
    with pytest.raises(ValueError, match=rf"{Q}\.weight: is quantized, but not among `modules`"):
        model_class("llama").from_pretrained(quantized)


def test_another_model(quantized: Path) -> None:
    edit_config(quantized, **{**CONFIGS["bert"]().to_dict(), "model_type": "bert"})
    with pytest.raises(ValueError, match=r"none of the 14 quantized modules .* is in BertForMaskedLM"):
        transformers.BertForMaskedLM.from_pretrained(quantized)


def test_a_tied_layer_that_is_quantized(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", "llama")
    config = PyquantConfig("nf4", modules_to_not_convert=["q_proj"])  # and so the head is quantized
    model = model_class("llama").from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "q")
    edit_config(tmp_path / "q", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r'lm_head\.weight: is quantized, but tied .* "tie_word_embeddings": false'):
        model_class("llama").from_pretrained(tmp_path / "q")


def test_config_json_of_another_version(quantized: Path) -> None:
    edit_config(quantized, {"version": 2, "something": "new"})
    with pytest.raises(ValueError, match="version: expected 1, got 2"):
        model_class("llama").from_pretrained(quantized)


def test_config_json_without_modules(quantized: Path) -> None:
    edit_config(quantized, {"modules": {}})
    with pytest.raises(ValueError, match=r"modules: config\.json lists no quantized modules"):
        model_class("llama").from_pretrained(quantized)


def test_a_model_that_keeps_the_weight_in_another_form(tmp_path: Path) -> None:
    """Checkpoint tensors that the model splits or merges, experts excepted."""
    folder = save_quantized(tmp_path, "llama")
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    merge = WeightConverter(["q_proj.weight", "r_proj.weight"], "q_proj.weight", [Concatenate(dim=0)])
    conversion_mapping.register_checkpoint_conversion_mapping("llama", [merge], overwrite=True)
    try:
        with pytest.raises(
            ValueError, match=r"q_proj: is quantized, but LlamaForCausalLM stores this weight in another"
        ):
            model_class("llama").from_pretrained(folder)
    finally:
        conversion_mapping._checkpoint_conversion_mapping_cache = None
