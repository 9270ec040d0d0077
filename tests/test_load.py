"""Loaders against the producers' own dequantization (golden files), and against references for what those leave out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from load_cases import Golden, awq_words, golden, gptq_tensors, little_endian_words, tinygemm_words

from pyquant import load, quantize
from pyquant.codes import unpack_codes
from pyquant.formats import FORMATS, ScaleType, ZeroType

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
each = pytest.mark.parametrize


def assert_expected(case: Golden, layer: load.LoadedLayer) -> None:
    """Bit for bit the producer's weight, in every dtype of the file."""
    assert case.expected
    for dtype, expected in case.expected.items():
        assert torch.equal(layer.dequantize(dtype), expected), dtype
    bias = case.tensors.get(f"{case.name}.bias")
    assert (layer.bias is None) == (bias is None)
    assert bias is None or torch.equal(layer.bias, bias)


def same_layer(a: load.LoadedLayer, b: load.LoadedLayer) -> bool:
    x, y = a.weight.state_dict(), b.weight.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@each("case", golden("bitsandbytes"), ids=str)
def test_bitsandbytes(case: Golden) -> None:
    layer = load.bitsandbytes(case.tensors, case.name)
    assert_expected(case, layer)
    assert layer.weight.format.name == case.settings["format"]
    assert layer.weight.codebook is None, "the format's codebook need not be stored again"
    assert (layer.weight.scale_type is ScaleType.NESTED) == case.settings["nested"]
    assert layer.weight.group_size == case.settings["group_size"]


def test_bitsandbytes_storage_dtypes_hold_the_same_bytes() -> None:
    """The weight's bytes under every storage dtype, NaN patterns included."""
    case = next(c for c in golden("bitsandbytes") if c.name == "nf4")
    expected = load.bitsandbytes(case.tensors, "nf4")
    stored = case.tensors["nf4.weight"].clone()
    stored[:8] = torch.tensor([0xFF, 0x7F, 0xFF, 0xFF, 0xC0, 0x7F, 0xC0, 0xFF], dtype=torch.uint8)[:, None]
    expected = load.bitsandbytes(case.tensors | {"nf4.weight": stored}, "nf4")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        viewed = stored.view(-1).view(dtype)[:, None]
        layer = load.bitsandbytes(case.tensors | {"nf4.weight": viewed}, "nf4")
        assert same_layer(layer, expected), dtype


@each("start", [0, 1, 4, 8])
@each("k", [32, 30])
def test_bitsandbytes_bytes_anywhere_in_a_file(start: int, k: int) -> None:
    """Tensors mapped from files start at any byte; codes of several pieces of the byte swap, and of no whole words."""
    n = 33333
    stored = torch.randint(0, 256, (start + n * k // 2,), dtype=torch.uint8)[start:]
    state = json.dumps({"quant_type": "nf4", "blocksize": 4096, "shape": [n, k]}).encode()
    tensors = {
        "p.weight": stored[:, None],
        "p.weight.absmax": torch.ones(-(-n * k // 4096)),
        "p.weight.quant_map": torch.tensor(FORMATS["nf4"].codebook),
        "p.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
    }
    codes = load.bitsandbytes(tensors, "p").weight.codes.view(-1).numpy()
    expected = stored.numpy()
    assert np.array_equal(codes, (expected >> 4) | (expected << 4))


def test_bitsandbytes_own_quant_map_is_kept() -> None:
    case = next(c for c in golden("bitsandbytes") if c.name == "nf4")
    values = torch.linspace(-1, 1, 16)
    layer = load.bitsandbytes(case.tensors | {"nf4.weight.quant_map": values}, "nf4")
    assert torch.equal(layer.weight.values(), values)


@each("case", golden("gptq"), ids=str)
def test_gptq(case: Golden) -> None:
    layer = load.gptq(case.tensors, case.name, **case.arguments("bits", "group_size", "checkpoint_format"))
    assert_expected(case, layer)
    wide = 4 if case.settings["bits"] <= 4 else 8
    assert layer.weight.format.name == (f"int{wide}" if case.settings["symmetric"] else f"uint{wide}")
    assert (layer.permutation is not None) == case.settings["act_order"]
    if layer.permutation is not None:
        assert torch.equal(layer.weight.dequantize(), layer.dequantize()[:, layer.permutation])


def test_gptq_group_size_and_g_idx_may_be_missing() -> None:
    case = next(c for c in golden("gptq") if c.name == "v2_asym")
    tensors = {name: t for name, t in case.tensors.items() if not name.endswith("g_idx")}
    assert_expected(case, load.gptq(tensors, case.name, checkpoint_format="gptq_v2"))


def test_gptq_v1_zero_of_sixteen() -> None:
    """A stored v1 zero of 15 means 16: it is not masked back to 0."""
    codes, scales = np.zeros((8, 32), dtype=np.int64), np.ones((8, 1))
    tensors = gptq_tensors(codes, np.full((8, 1), 16), scales, np.zeros(32, dtype=np.int64), 4, 1)
    layer = load.gptq(tensors, "p")
    assert torch.equal(layer.dequantize(), torch.full((8, 32), -16.0))


@each("case", golden("awq"), ids=str)
def test_awq(case: Golden) -> None:
    layer = load.awq(case.tensors, case.name, **case.arguments("group_size"))
    assert_expected(case, layer)
    assert layer.weight.format.name == ("int4" if case.settings["symmetric"] else "uint4")


HQQ_LOADED = [c for c in golden("hqq") if c.settings["axis"] == 1 and c.settings["bits"] <= 4]


@each("case", HQQ_LOADED, ids=str)
def test_hqq(case: Golden) -> None:
    layer = load.hqq(case.tensors, case.name)
    weight = layer.weight
    assert torch.equal(layer.dequantize(), case.expected[torch.float32]), "HQQ's arithmetic in fp32"
    assert (weight.format.name, weight.zero_type) == ("uint4", ZeroType.FLOAT)
    # HQQ rounds the difference and the product to its compute dtype, we round the product: three half units.
    dtype = getattr(torch, case.settings["dtype"])
    own, exact = case.expected[dtype].double(), case.expected[torch.float32].double()
    difference = (layer.dequantize(dtype).double() - own).abs()
    assert bool((difference <= 1.5 * torch.finfo(dtype).eps * exact.abs() + 1e-12).all())
    assert torch.equal(layer.bias, case.tensors[f"{case.name}.bias"])


def test_hqq_settings_may_be_python_values() -> None:
    """As in the ``.pt`` files that HQQ itself writes."""
    case = next(c for c in HQQ_LOADED if c.name == "4bit")
    plain = {"4bit.shape": torch.Size((8, 64)), "4bit.axis": 1, "4bit.packing": "4bit_u8", "4bit.group_size": 32}
    assert same_layer(load.hqq(case.tensors | plain, "4bit"), load.hqq(case.tensors, "4bit"))


@each("case", golden("compressed_tensors"), ids=str)
def test_compressed_tensors(case: Golden) -> None:
    layer = load.compressed_tensors(case.tensors, case.name, **case.arguments("num_bits", "group_size"))
    assert_expected(case, layer)
    if "symmetric" in case.settings:
        wide = 4 if case.settings["num_bits"] <= 4 else 8
        assert layer.weight.format.name == (f"int{wide}" if case.settings["symmetric"] else "uint4")
    else:
        assert layer.weight.format.name == case.settings["format"]


@each("case", golden("gpt_oss"), ids=str)
def test_mxfp4_experts(case: Golden) -> None:
    layers = load.mxfp4_experts(case.tensors, case.name)
    assert len(layers) == case.settings["experts"]
    for e, layer in enumerate(layers):
        assert torch.equal(layer.dequantize(torch.bfloat16), case.expected[torch.bfloat16][e])
        assert torch.equal(layer.bias, case.tensors[f"{case.name}_bias"][e])


def nvfp4_tensors(divisor: float | None) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """A ModelOpt layer, or with a divisor one of compressed-tensors, with all scales and codes; E2M1 values [N, K]."""
    codes = np.random.default_rng(0).integers(0, 16, (126, 32))
    scales = torch.arange(1, 127, dtype=torch.uint8)[:, None].expand(-1, 2).contiguous().view(torch.float8_e4m3fn)
    packed = torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8))
    if divisor is None:
        tensors = {"p.weight": packed, "p.weight_scale": scales, "p.weight_scale_2": torch.tensor(0.0123)}
    else:
        tensors = {
            "p.weight_packed": packed,
            "p.weight_scale": scales,
            "p.weight_global_scale": torch.tensor([divisor]),
        }
    return tensors, E2M1[codes]


@each("case", golden("modelopt"), ids=str)
def test_nvfp4_of_modelopt(case: Golden) -> None:
    layer = load.nvfp4(case.tensors, case.name)
    assert_expected(case, layer)
    assert layer.weight.format.name == "nvfp4"


def test_nvfp4_of_modelopt_with_every_scale() -> None:
    """The scales and codes that the golden file does not reach."""
    tensors, values = nvfp4_tensors(None)
    layer = load.nvfp4(tensors, "p")
    scales = tensors["p.weight_scale"].float() * tensors["p.weight_scale_2"]
    assert layer.weight.format.name == "nvfp4"
    assert torch.equal(layer.dequantize(), torch.from_numpy(values).float() * scales.repeat_interleave(16, dim=1))


NVFP4_DIVISORS = {1.0: "nvfp4", 512.0: "nvfp4", 3.0: "nvfp4", 391.4: "nvfp4", 726.4865: "nvfp4", 1e-3: "codebook4"}


@each(("divisor", "name"), NVFP4_DIVISORS.items())
def test_nvfp4_divisors(divisor: float, name: str) -> None:
    """compressed-tensors divides; fp16 and bf16 results are the same, whatever the factor it becomes."""
    tensors, values = nvfp4_tensors(divisor)
    layer = load.nvfp4(tensors, "p")
    quotients = tensors["p.weight_scale"].float() / tensors["p.weight_global_scale"]
    expected = torch.from_numpy(values).float() * quotients.repeat_interleave(16, dim=1)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(layer.dequantize(dtype), expected.to(dtype))
    assert torch.allclose(layer.dequantize(), expected, rtol=3 * 2.0**-24, atol=0)
    assert layer.weight.format.name == name


@each("case", golden("torchao"), ids=str)
def test_torchao(case: Golden) -> None:
    layer = load.torchao(case.tensors, case.name, kind=case.settings["kind"])
    weight, expected = layer.weight, case.expected[torch.float32]
    assert weight.group_size == case.settings["group_size"]
    assert weight.format.name == ("int4" if case.settings["symmetric"] else "uint4")
    if case.settings["symmetric"]:
        assert torch.equal(layer.dequantize(), expected)
    scales = weight.decode_scales().repeat_interleave(weight.group_size, dim=1)
    bound = 2.0**-23 * (expected.abs() + 16 * scales)
    assert bool(((layer.dequantize() - expected).abs() <= bound).all())


TINYGEMM = [
    "tiles8_group32", "tiles8_group64", "tiles8_group128", "tiles8_symmetric", "tiles4_group64", "tiles2_group32",
    "tiles2_symmetric",
]  # fmt: skip


@each("name", TINYGEMM)
def test_tinygemm(name: str) -> None:
    """The codes that torch's operator packed, and the weights that its kernel multiplies with."""
    case = next(c for c in golden("tinygemm") if c.name == name)
    packed, both = case.tensors[f"{name}._weight_qdata"], case.tensors[f"{name}._weight_scale_and_zero"]
    assert packed.shape[-1] * 2 == case.settings["inner_k_tiles"]
    layer = load.tinygemm(packed, both)
    assert same_layer(layer, load.torchao(case.tensors, name, kind="Int4TilePackedTo4dTensor"))
    weight, expected = layer.weight, case.expected[torch.bfloat16]
    assert weight.group_size == case.settings["group_size"]
    high_first = case.tensors[f"{name}.codes"]
    codes = torch.stack([high_first >> 4, high_first & 0x0F], dim=-1).view(weight.shape)
    if case.settings["symmetric"]:
        assert weight.format.name == "int4"
        assert torch.equal(unpack_codes(weight.codes, weight.k, 4), codes ^ 8)
        assert torch.equal(layer.dequantize(torch.bfloat16), expected)
        return
    assert weight.format.name == "uint4"
    assert torch.equal(unpack_codes(weight.codes, weight.k, 4), codes)
    # The zero point in code units is rounded to fp32, which shows in bf16 where a weight lies halfway between numbers.
    ours, own = layer.dequantize(torch.bfloat16).double(), expected.double()
    scales = weight.decode_scales().repeat_interleave(weight.group_size, dim=1)
    exact = layer.dequantize().double()
    halfway = (exact - (ours + own) / 2).abs() <= 2.0**-23 * (exact.abs() + 16 * scales)
    assert bool((halfway | (ours == own)).all())
    assert float((ours == own).double().mean()) > 0.9


def test_every_case_of_tinygemm_is_tested() -> None:
    assert [case.name for case in golden("tinygemm")] == TINYGEMM


@each("tiles", [2, 4, 8])
def test_tinygemm_layout(tiles: int) -> None:
    """The packing of tinygemm's CUDA kernel, written from its description."""
    rng = np.random.default_rng(tiles)
    codes = rng.integers(0, 16, (16, 256))
    both = torch.zeros(2, 16, 2, dtype=torch.bfloat16)
    both[:, :, 0] = torch.from_numpy(rng.uniform(0.01, 0.02, (2, 16)))
    layer = load.tinygemm(tinygemm_words(codes, tiles), both)
    scales = both[:, :, 0].t().float().repeat_interleave(128, dim=1)
    assert layer.weight.format.name == "int4"
    assert torch.equal(layer.dequantize(), torch.from_numpy(codes - 8).float() * scales)


def test_tile_packed_padding_is_cut_off() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (16, 1024))
    both = torch.zeros(8, 16, 2, dtype=torch.bfloat16)
    both[:, :, 0], both[:, :, 1] = 0.5, 1.25
    tensors = {"p._weight_qdata": tinygemm_words(codes, 8), "p._weight_scale_and_zero": both}
    layer = load.torchao(tensors, "p", shape=(13, 700), kind="Int4TilePackedTo4dTensor")
    assert layer.weight.shape == (13, 700)
    assert torch.equal(layer.dequantize(), torch.from_numpy(codes[:13, :700] - 8).float() * 0.5 + 1.25)


# ---- round trips through packings written in numpy


@given(st.data())
def test_bitsandbytes_round_trip(data: st.DataObject) -> None:
    """What pyquant quantizes, in the form in which bitsandbytes stores it."""
    name, nested = data.draw(st.sampled_from(["nf4", "fp4"])), data.draw(st.booleans())
    n, k, size = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 150)), data.draw(st.sampled_from([32, 64, 128]))
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**32))))
    weight = quantize(w, name, group_size=size, nested=nested)
    codes = np.append(unpack_codes(weight.codes, k, 4).reshape(-1).numpy(), np.zeros(n * k % 2, dtype=np.uint8))
    stored = torch.from_numpy(codes[::2] << 4 | codes[1::2])
    storage = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float32]))
    if stored.numel() % storage.itemsize == 0:
        stored = stored.view(storage)
    state: dict[str, object] = {"quant_type": name, "blocksize": size, "shape": [n, k]}
    tensors = {
        "p.weight": stored[:, None],
        "p.weight.absmax": weight.scales.reshape(-1),
        "p.weight.quant_map": torch.tensor(FORMATS[name].codebook),
    }
    if nested:
        offset, map_, absmax = weight.nested_parts()
        state |= {"nested_blocksize": 256, "nested_offset": float(offset)}
        tensors |= {"p.weight.nested_absmax": absmax, "p.weight.nested_quant_map": map_}
    blob = json.dumps(state).encode()
    tensors[f"p.weight.quant_state.bitsandbytes__{name}"] = torch.tensor(list(blob), dtype=torch.uint8)
    assert same_layer(load.bitsandbytes(tensors, "p"), load.LoadedLayer(weight))


@given(st.data())
def test_gptq_round_trip(data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([2, 3, 4]))
    n, groups, size = (
        32 * data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([32, 64])),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    k, v1 = groups * size, data.draw(st.booleans())
    codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(int(v1), (1 << bits) + int(v1), (n, groups))
    scales = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16)
    g_idx = np.arange(k) // size
    if data.draw(st.booleans()):
        rng.shuffle(g_idx)
    tensors = gptq_tensors(codes, zeros, scales, g_idx, bits, int(v1))
    layer = load.gptq(tensors, "p", bits=bits, group_size=size, checkpoint_format="gptq" if v1 else "gptq_v2")
    expected = (codes - zeros[:, g_idx]) * scales[:, g_idx].astype(np.float64)
    assert torch.equal(layer.dequantize(), torch.from_numpy(expected).float())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32))
def test_awq_round_trip(columns: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = 8 * columns, 32 * groups
    codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (groups, n))
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (groups, n))).half()
    tensors = {"p.qweight": awq_words(codes), "p.qzeros": awq_words(zeros), "p.scales": scales}
    expected = (codes - zeros.repeat(32, axis=0)) * scales.double().numpy().repeat(32, axis=0)
    assert torch.equal(load.awq(tensors, "p").dequantize(), torch.from_numpy(expected.T.copy()).float())


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 5), st.booleans(), st.integers(0, 2**32))
def test_compressed_tensors_round_trip(bits: int, k: int, n: int, symmetric: bool, seed: int) -> None:
    symmetric = symmetric or bits > 4
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (n, k))
    zeros = np.full((n, 1), 1 << (bits - 1)) if symmetric else rng.integers(0, 1 << bits, (n, 1))
    scales = torch.from_numpy(rng.uniform(0.01, 0.1, (n, 1))).float()
    tensors = {
        "p.weight_packed": little_endian_words(codes, bits),
        "p.weight_scale": scales,
        "p.weight_shape": torch.tensor([n, k]),
    }
    if not symmetric:
        tensors["p.weight_zero_point"] = little_endian_words(zeros.T, bits).t().contiguous()
    layer = load.compressed_tensors(tensors, "p", num_bits=bits)
    expected = torch.from_numpy(codes - zeros).float() * scales
    assert torch.equal(layer.dequantize(), expected)
    padding = layer.weight.k * layer.weight.format.bits % 8
    assert not padding or not bool((layer.weight.codes[:, -1] >> padding).any())


@given(st.sampled_from([1, 2, 3, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32))
def test_hqq_round_trip(bits: int, eights: int, groups: int, seed: int) -> None:
    """Rows r, r + R / parts, .. share an element, the first one in the highest bits; 3 bits: ten in an int32."""
    rng = np.random.default_rng(seed)
    n, size = 8 * eights, 16
    rows, parts = n * groups, {1: 8, 2: 4, 3: 10, 4: 2}[bits]
    codes = rng.integers(0, 1 << bits, (rows, size))
    padded = np.zeros((-(-rows // parts) * parts, size), dtype=np.int64)
    padded[:rows] = codes
    split = padded.reshape(parts, -1, size)
    packed = sum(split[i] << (bits * (parts - 1 - i)) for i in range(parts))
    scale, zero = (torch.from_numpy(rng.uniform(0.1, 7, (rows, 1))).half() for _ in range(2))
    packing = {1: b"1bit_u8", 2: b"2bit_u8", 3: b"3bit_32", 4: b"4bit_u8"}[bits]
    tensors = {
        "p.W_q": torch.from_numpy(packed.astype(np.int32 if bits == 3 else np.uint8)),
        "p.scale": scale, "p.zero": zero, "p.shape": torch.tensor([n, size * groups]), "p.axis": torch.tensor(1),
        "p.packing": torch.tensor(list(packing), dtype=torch.uint8),
        "p.group_size": torch.tensor(size),
    }  # fmt: skip
    expected = ((torch.from_numpy(codes).float() - zero.float()) * scale.float()).view(n, -1)
    assert torch.equal(load.hqq(tensors, "p").dequantize(), expected)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32))
def test_mxfp4_round_trip(n: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, scales = rng.integers(0, 16, (n, 32 * groups)), rng.integers(0, 250, (n, groups))
    tensors = {
        "p.weight_packed": torch.from_numpy((codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)),
        "p.weight_scale": torch.from_numpy(scales.astype(np.uint8)),
    }
    expected = E2M1[codes] * 2.0 ** (scales.repeat(32, axis=1) - 127.0)
    layer = load.mxfp4(tensors, "p")
    assert torch.equal(layer.dequantize(), torch.from_numpy(expected).float())
    assert layer.weight.format is FORMATS["mxfp4"]
