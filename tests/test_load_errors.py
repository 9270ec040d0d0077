"""Bad checkpoints: every message names the loader and the tensor, and says what was expected and found."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from load_cases import golden

from pyquant import load
from pyquant.load import LoadedLayer

Tensors = dict[str, torch.Tensor]


def layer_of(producer: str, name: str) -> Tensors:
    """The tensors of one golden layer, called ``p``."""
    tensors = golden(producer)[0].tensors
    return {"p" + key.removeprefix(name): t for key, t in tensors.items() if key.startswith(name + ".")}


def with_json(changes: dict[str, object]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        key = next(name for name in tensors if "quant_state" in name)
        state = json.loads(bytes(tensors[key].tolist())) | changes
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(f"p.{name}")


def put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(f"p.{name}", value)


def map_(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(f"p.{name}", function(tensors[f"p.{name}"]))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan"))


def split_k(tensors: Tensors) -> None:
    """The first half of K, as one of two ranks has it, of a layer whose inputs take turns between its groups."""
    tensors["p.qweight"] = tensors["p.qweight"][:4]
    tensors["p.g_idx"] = torch.arange(32).int() % 2


KEY = r"p\.weight\.quant_state\.bitsandbytes__nf4"
BITSANDBYTES = [
    (without("weight.quant_state.bitsandbytes__nf4"), r"p\.weight\.quant_state.*expected a tensor .* got none"),
    (without("weight"), r"p\.weight: expected a tensor, got none"),
    (without("weight.absmax"), r"p\.weight\.absmax: expected a tensor, got none"),
    (map_("weight", lambda t: t[:-1]), r"p\.weight: expected 256 bytes for 4 x 128 codes, got 255"),
    (map_("weight", torch.Tensor.int), r"p\.weight: expected uint8 or .*, got int32 \[256, 1\]"),
    (map_("weight.absmax", nan), r"p\.weight\.absmax: expected finite values, got NaN or Inf"),
    (map_("weight.absmax", lambda t: t[:-1]), r"p\.weight\.absmax: expected float32 \[8\], got float32 \[7\]"),
    (map_("weight.quant_map", nan), r"p\.weight\.quant_map: expected finite"),
    (map_("weight.quant_map", lambda t: t[:8]), r"p\.weight\.quant_map: expected float32 \[16\]"),
    (put("weight.quant_state.bitsandbytes__nf4", torch.zeros(3, dtype=torch.uint8)), KEY + ": expected JSON"),
    (put("weight.quant_state.bitsandbytes__nf4", torch.tensor([91, 93], dtype=torch.uint8)), KEY + ".* got list"),
    (with_json({"quant_type": "fp4"}), KEY + ": quant_type: expected 'nf4', got 'fp4'"),
    (with_json({"blocksize": 48}), KEY + ": blocksize: expected 32 or 64 .*, got 48"),
    (with_json({"shape": [4]}), KEY + r": shape: expected \[N, K\], got \[4\]"),
    (with_json({"shape": [4, 0]}), KEY + r": shape: expected \[N, K\], got \[4, 0\]"),
    (put("bias", torch.zeros(3)), r"p\.bias: expected .* \[4\], got float32 \[3\]"),
]
NESTED = [
    (with_json({"nested_blocksize": 128}), KEY + ": nested_blocksize: expected 256, got 128"),
    (with_json({"nested_offset": float("nan")}), KEY + ": nested_offset: expected a finite number, got nan"),
    (with_json({"nested_offset": None}), KEY + ": nested_offset: expected a finite number, got None"),
    (without("weight.nested_quant_map"), r"p\.weight\.nested_quant_map: expected a tensor, got none"),
    (without("weight.nested_absmax"), r"p\.weight\.absmax: expected float32 \[8\], got uint8 \[8\]"),
    (map_("weight.nested_absmax", nan), r"p\.weight\.nested_absmax: expected finite"),
]
GPTQ = [
    (without("qweight"), r"p\.qweight: expected a tensor, got none"),
    (without("scales"), r"p\.scales: expected a tensor, got none"),
    (map_("scales", nan), r"p\.scales: expected finite"),
    (map_("scales", lambda t: t[:, :-1]), r"p\.scales: expected .* \[\*, 32\], got float16 \[2, 31\]"),
    (map_("scales", lambda t: t[:1]), r"p\.scales: expected ceil\(64 / group_size\) rows, got 1 with group_size 32"),
    (map_("qzeros", lambda t: t[:, :2]), r"p\.qzeros: expected int32 \[2, 4\], got int32 \[2, 2\]"),
    (map_("qweight", torch.Tensor.long), r"p\.qweight: expected int32 \[\*, \*\], got int64"),
    (map_("qweight", lambda t: t[:0]), r"p\.qweight: expected \[K \* 4 / 32, N\]"),
    (map_("g_idx", lambda t: t[:-1]), r"p\.g_idx: expected int32 or int64 \[64\], got int32 \[63\]"),
    (
        split_k,
        r"p\.g_idx: act-order with split K: 32 inputs that take their scales from 2 groups of 32; convert the whole",
    ),
    (map_("g_idx", torch.zeros_like), r"p\.g_idx: expected 32 inputs in each of 2 groups, got other counts"),
]
AWQ = [
    (map_("qzeros", lambda t: t[:1]), r"p\.qzeros: expected int32 \[2, 4\], got int32 \[1, 4\]"),
    (map_("scales", nan), r"p\.scales: expected finite"),
    (map_("scales", lambda t: t[:1]), r"p\.scales: expected ceil\(64 / group_size\) rows, got 1 with group_size 32"),
    (map_("qweight", lambda t: t[:, :0]), r"p\.qweight: expected \[K, N / 8\]"),
]
HQQ = [
    (without("shape"), r"p\.shape: expected \[N, K\], got none"),
    (put("axis", torch.tensor(0)), r"p\.axis: expected 1, got 0: .*quantize again with axis=1"),
    (put("packing", torch.tensor(list(b"8bit_u8"), dtype=torch.uint8)), r"p\.packing: expected .*, got '8bit_u8'"),
    (put("group_size", torch.tensor(48)), r"p\.group_size: expected a divisor of K=64.*, got 48"),
    (map_("W_q", lambda t: t[:-1]), r"p\.W_q: expected \[8, 32\] 4bit_u8 elements, got \[7, 32\]"),
    (map_("scale", nan), r"p\.scale: expected finite"),
    (map_("zero", lambda t: t[:-1]), r"p\.zero: expected .* \[16, 1\], got float16 \[15, 1\]"),
]
COMPRESSED = [
    (without("weight_shape"), r"p\.weight_shape: expected a tensor, got none"),
    (
        map_("weight_packed", lambda t: t[:, :-1]),
        r"p\.weight_packed: expected \[8, ceil\(64 \* num_bits / 32\)\], got 7",
    ),
    (map_("weight_scale", nan), r"p\.weight_scale: expected finite"),
    (map_("weight_scale", lambda t: t[:4]), r"p\.weight_scale: expected \[8, groups\], got \[4, 2\]"),
    (put("weight_g_idx", torch.zeros(64).int()), r"p\.weight_g_idx: expected no act-order"),
]
NVFP4 = [
    (
        put("weight_global_scale", torch.zeros(1)),
        r"p\.weight_global_scale: expected one value other than 0, got \[0.0\]",
    ),
    (put("weight_scale", torch.full((8, 4), 0x7F, dtype=torch.uint8)), r"p\.weight_scale: expected finite"),
    (map_("weight_scale", lambda t: t[:, :-1]), r"p\.weight_scale: expected .* \[8, 4\], got .* \[8, 3\]"),
]
MODELOPT = [
    (without("weight_scale_2"), r"p\.weight_scale_2: expected a tensor, got none"),
    (put("pre_quant_scale", torch.ones(32)), r"p\.pre_quant_scale: expected none: .*export plain NVFP4"),
    (put("svdquant_lora_a", torch.ones(4, 32)), r"p\.svdquant_lora_a: expected none"),
    (map_("weight_scale", lambda t: t[:, :1]), r"p\.weight_scale: expected .* \[16, 2\], got .* \[16, 1\]"),
]
MXFP4 = [
    (
        put("weight_scale", torch.full((8, 2), 255, dtype=torch.uint8)),
        r"p\.weight_scale: expected finite .* NaN \(255\)",
    ),
    (map_("weight_scale", lambda t: t[:, :-1]), r"p\.weight_scale: expected \[8, 64 / 32\], got \[8, 1\]"),
]
TORCHAO = [
    (without("_weight_zero_point"), r"p\._weight_zero_point: expected a tensor, got none"),
    (map_("_weight_scale", nan), r"p\._weight_scale: expected finite"),
    (map_("_weight_scale", torch.zeros_like), r"p\.weight: a scale of 0 with a zero point other than 0"),
    (put("_weight_act_pre_scale", torch.ones(1)), r"p\._weight_act_pre_scale: expected none"),
    (map_("_weight_qdata", lambda t: t[:-1]), r"p\._weight_scale: expected .* \[\*, 7\], got bfloat16 \[4, 8\]"),
]
CASES = [
    *[("bitsandbytes", "bitsandbytes", "nf4", *case) for case in BITSANDBYTES],
    *[("bitsandbytes", "bitsandbytes", "nf4_nested", *case) for case in NESTED],
    *[("gptq", "gptq", "v1_sym", *case) for case in GPTQ],
    *[("awq", "awq", "asym", *case) for case in AWQ],
    *[("hqq", "hqq", "4bit", *case) for case in HQQ],
    *[("compressed_tensors", "compressed_tensors", "4bit_sym", *case) for case in COMPRESSED],
    *[("nvfp4", "compressed_tensors", "nvfp4", *case) for case in NVFP4],
    *[("nvfp4", "modelopt", "w4a16.self_attn.k_proj", *case) for case in MODELOPT],
    *[("mxfp4", "compressed_tensors", "mxfp4", *case) for case in MXFP4],
    *[("torchao", "torchao", "plain", *case) for case in TORCHAO],
]


def read(loader: str, tensors: Tensors) -> LoadedLayer:
    arguments = {"group_size": 32} if loader in ("gptq", "awq") else {}
    layer: LoadedLayer = getattr(load, loader)(tensors, "p", **arguments)
    return layer


@pytest.mark.parametrize(
    ("loader", "producer", "name", "change", "message"), CASES, ids=lambda v: v[:40] if isinstance(v, str) else ""
)
def test_damaged_layers(loader: str, producer: str, name: str, change: Callable[[Tensors], None], message: str) -> None:
    tensors = layer_of(producer, name)
    assert read(loader, tensors).weight.n > 0, "the layer was fine"
    change(tensors)
    with pytest.raises(load.LoadError, match=rf"^load\.{loader}: {message}"):
        read(loader, tensors)


LAYERS = sorted({(loader, producer, name) for loader, producer, name, _, _ in CASES})


RESHAPED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "flat": lambda t: t.reshape(-1),
    "empty": lambda t: t.reshape(-1)[:0],
    "scalar": lambda t: t.reshape(-1)[0],
    "transposed": lambda t: t.t() if t.dim() == 2 else t[None],
    "cut": lambda t: t.reshape(-1)[:-1],
    "longer": lambda t: torch.cat([t.reshape(-1), t.reshape(-1)]),
}


def damaged(data: st.DataObject, tensor: torch.Tensor) -> torch.Tensor | None:
    """The tensor in another dtype, shape or with other bytes; None for no tensor."""
    kind = data.draw(
        st.sampled_from(["missing", "dtype", "flat", "empty", "scalar", "transposed", "cut", "longer", "bytes"])
    )
    if kind == "missing":
        return None
    if kind == "dtype":
        return tensor.to(
            data.draw(st.sampled_from([torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64]))
        )
    if kind == "bytes":
        raw = tensor.contiguous().reshape(-1).view(torch.uint8)
        noise = torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return noise.view(tensor.dtype).view(tensor.shape)
    return RESHAPED[kind](tensor)


@settings(max_examples=400)
@given(st.data())
def test_any_damage_is_a_load_error_or_a_sound_weight(data: st.DataObject) -> None:
    loader, producer, name = data.draw(st.sampled_from(LAYERS))
    tensors = layer_of(producer, name)
    key = data.draw(st.sampled_from(sorted(tensors)))
    changed = damaged(data, tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    with suppress(load.LoadError):
        layer = read(loader, tensors)
        layer.weight.check()
        assert layer.dequantize().shape == layer.weight.shape


def test_settings_that_are_refused() -> None:
    gptq = layer_of("gptq", "v1_sym")
    with pytest.raises(load.LoadError, match=r"checkpoint_format: expected gptq or gptq_v2, got 'marlin'"):
        load.gptq(gptq, "p", checkpoint_format="marlin")
    with pytest.raises(load.LoadError, match=r"p\.bits: expected 2, 3, 4 or 8, got 5"):
        load.gptq(gptq, "p", bits=5)
    with pytest.raises(load.LoadError, match=r"p\.weight: group_size: .* expects .*, got 8"):
        load.gptq(layer_with_groups_of_8(), "p", group_size=8)
    eight = layer_of("gptq", "v2_8bit_sym")
    with pytest.raises(load.LoadError, match=r"p\.qzeros: 8-bit codes with zero points: expected symmetric"):
        load.gptq(eight, "p", bits=8)  # v1: the zeros would be 129
    with pytest.raises(load.LoadError, match=r"p\.version: expected 'gemm', .*, got 'gemv'"):
        load.awq(layer_of("awq", "asym"), "p", version="gemv")
    with pytest.raises(load.LoadError, match=r"p\.num_bits: expected 1\.\.8, got 9"):
        load.compressed_tensors(layer_of("compressed_tensors", "4bit_sym"), "p", num_bits=9)
    with pytest.raises(load.LoadError, match=r"expected Int4Tensor or .*, got Int4PreshuffledTensor"):
        load.torchao(layer_of("torchao", "plain"), "p", kind="Int4PreshuffledTensor")


def layer_with_groups_of_8() -> Tensors:
    return {
        "p.qweight": torch.zeros(8, 8, dtype=torch.int32),
        "p.qzeros": torch.zeros(8, 1, dtype=torch.int32),
        "p.scales": torch.ones(8, 8).half(),
    }


def test_hqq_golden_cases_that_are_refused() -> None:
    tensors = golden("hqq")[0].tensors
    with pytest.raises(load.LoadError, match=r"axis_0\.axis: expected 1, got 0: axis 0 groups run across"):
        load.hqq(tensors, "axis_0")
    with pytest.raises(load.LoadError, match=r"8bit\.packing: expected 4bit_u8 or .*, got '8bit_u8'"):
        load.hqq(tensors, "8bit")


def test_experts_and_tinygemm() -> None:
    tensors = dict(golden("gpt_oss")[0].tensors)
    prefix = "mlp.experts.gate_up_proj"
    tensors[f"{prefix}_scales"] = tensors[f"{prefix}_scales"][:, :, :1]
    with pytest.raises(load.LoadError, match=r"mlp\.experts\.gate_up_proj_scales: expected uint8 \[2, 16, 2\]"):
        load.mxfp4_experts(tensors, prefix)
    packed, both = torch.zeros(2, 1, 32, 4, dtype=torch.int32), torch.ones(2, 16, 2).bfloat16()
    with pytest.raises(load.LoadError, match=r"load\.tinygemm: packed: expected int32 \[\*, \*, 32, \*\]"):
        load.tinygemm(packed[:, :, :8], both)
    with pytest.raises(load.LoadError, match=r"load\.tinygemm: packed: expected \[N / 8, .*got \[2, 1, 32, 3\]"):
        load.tinygemm(packed[..., :3], both)
    with pytest.raises(load.LoadError, match=r"load\.tinygemm: packed: expected the packed form of \[99, 128\]"):
        load.tinygemm(packed, both, shape=(99, 128))
    with pytest.raises(load.LoadError, match=r"load\.tinygemm: scales_and_zeros: expected .* \[\*, 16, 2\]"):
        load.tinygemm(packed, both[:, :8])


def test_recognise() -> None:
    for producer in ("bitsandbytes", "hqq", "compressed_tensors", "torchao"):
        plan = load.recognise([n for n in golden(producer)[0].tensors], None)
        assert plan.producer.name == producer.replace("_", "-")
        assert plan.layers
        assert all(name.endswith(".bias") for name in plan.copied)
    names = ["a.qweight", "a.qzeros", "a.scales", "a.g_idx", "a.bias", "norm.weight"]
    plan = load.recognise(names, {"quant_method": "gptq"})
    assert plan.layers == {"a": names[:4]}
    assert plan.copied == ["a.bias", "norm.weight"]
    # Part of the layer, so that its loader sees and refuses it: copied, it would be lost on the converted model.
    plan = load.recognise(["a.input_scale", "a.pre_quant_scale", "a.weight", "a.weight_scale_2"], None)
    assert plan.layers == {"a": ["a.weight_scale_2", "a.weight", "a.pre_quant_scale"]}
    assert plan.copied == ["a.input_scale"]


@pytest.mark.parametrize(
    ("names", "config", "message"),
    [
        (["a.weight"], None, "expected quantized layers of bitsandbytes, .*, got none"),
        (["a.weight"], {"quant_method": "gptq"}, r"gptq: expected tensors called \*\.qweight, got none"),
        (
            ["a.qweight"],
            {"quant_method": "quip"},
            "quant_method: expected one of bitsandbytes, .*, got 'quip'; dequantize .* use `pyquant quantize`",
        ),
        (["a.qweight"], {}, "quant_method: expected one of .*, got None"),
        (["a.qweight"], None, r"called \*\.qweight: expected config.json with a quantization_config, got none"),
        (
            ["a.qweight", "b.W_q"],
            None,
            r"called \*\.qweight: expected config.json with a quantization_config, got none",
        ),
        (
            ["a.W_q", "b.weight_packed"],
            None,
            r"expected one format, got hqq and compressed-tensors \(a\.W_q, b\.weight_packed\); dequantize the layers",
        ),
        (["a.W_q", "b.weight_packed"], {"quant_method": "hqq"}, r"b\.weight_packed: expected a tensor of hqq or of no"),
        (["a.W_q", "b.SCB"], None, r"b\.SCB: .*mixed formats are not read; dequantize the layers of all but one"),
        (
            ["a.SCB", "a.weight"],
            {"quant_method": "bitsandbytes"},
            r"got those of LLM\.int8\(\), a\.SCB, .*load it in 4 bits",
        ),
        (
            ["a.qweight", "b.qzeros"],
            {"quant_method": "gptq"},
            r"b\.qzeros: expected b\.qweight beside it, got none: .*incomplete",
        ),
        (
            ["a.qweight", "b.scales"],
            {"quant_method": "awq"},
            r"b\.scales: expected b\.qweight beside it, got none: .*incomplete",
        ),
        (
            ["a.qweight", "a.weight", "b.weight"],
            {"quant_method": "gptq"},
            r"a\.weight: expected none beside a\.qweight: .*remove one of them",
        ),
    ],
)
def test_checkpoints_that_are_not_recognised(names: list[str], config: dict | None, message: str) -> None:
    with pytest.raises(load.LoadError, match=rf"^load\.recognise: {message}|^load\.recognise: .*{message}"):
        load.recognise(names, config)


@pytest.mark.parametrize(
    ("producer", "name", "loader"),
    [
        ("bitsandbytes", "weight", load.bitsandbytes),
        ("bitsandbytes", "bias", load.bitsandbytes),
        ("gptq", "scales", load.gptq),
        ("gptq", "g_idx", load.gptq),
        ("awq", "qzeros", load.awq),
        ("hqq", "zero", load.hqq),
    ],
)
def test_a_tensor_on_another_device(producer: str, name: str, loader: Callable[..., LoadedLayer]) -> None:
    """The meta device stands for it: this machine may have no other."""
    case = next(c for c in golden(producer) if f"{c.name}.{name}" in c.tensors)
    tensors = dict(case.tensors)
    tensors[f"{case.name}.{name}"] = tensors[f"{case.name}.{name}"].to("meta")
    expected = rf"{case.name}\.{name}: expected a tensor on cpu, where .* got one on meta"
    with pytest.raises(load.LoadError, match=expected):
        loader(tensors, case.name)
