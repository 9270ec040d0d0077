"""The quantizer and the canonical weight: nearest codes, exact zeros, any strides, clear errors, state_dict."""

from __future__ import annotations

import importlib
import re

import numpy as np
import pytest
import torch
from conftest import (
    VARIANTS,
    Variant,
    code_values,
    each_dtype,
    each_format,
    each_variant,
    exact_codes,
    exact_scales,
    exact_weight,
    group_index,
    make_weight,
    random_weight,
    same_weight,
    user_codebook,
)

from pyquant import QuantizedWeight, quantize
from pyquant.formats import FORMATS, Encoding, Format, ScaleType, ZeroType

quantize_module = importlib.import_module("pyquant.quantize")
weight_module = importlib.import_module("pyquant.weight")

DEFAULTS = [v for v in VARIANTS if v.scale_type is v.format.scale_types[0]]
SHAPES = [(5, 130), (3, 64), (1, 1), (7, 100)]


def absmax_of_blocks(w: torch.Tensor, weight: QuantizedWeight) -> np.ndarray:
    index = group_index(weight).reshape(-1)
    absmax = np.zeros(index.max() + 1)
    np.maximum.at(absmax, index, w.double().abs().numpy().reshape(-1))
    return absmax


@each_variant
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_codes_are_the_nearest(variant: Variant, n: int, k: int) -> None:
    """Brute force over all codes, for scales and zeros as they decode; fp32 rounding may move a boundary by an ulp."""
    w = torch.randn(n, k)
    for group_size in variant.group_sizes(k):
        weight = quantize(w, variant.format.name, group_size, **variant.arguments())
        weight.check()
        # bitsandbytes chooses codes before it nests absmax.
        nested = variant.scale_type is ScaleType.NESTED
        index = group_index(weight)
        scale = (absmax_of_blocks(w, weight) if nested else exact_scales(weight))[index]
        zero = np.zeros(1) if weight.zeros is None else weight.zeros.double().numpy().reshape(-1)[index]
        values = code_values(weight)
        candidates = (values - zero[..., None]) * scale[..., None]
        error = np.abs(candidates - w.double().numpy()[..., None])
        chosen = np.take_along_axis(error, exact_codes(weight)[..., None], axis=2)[..., 0]
        slack = 4 * 2.0**-24 * (np.abs(w.numpy()) + scale * (np.abs(values).max() + np.abs(zero)))
        assert bool((chosen <= error.min(axis=2) + slack).all())


@each_variant
def test_scales_reach_the_extremes(variant: Variant) -> None:
    """A step is as large as a group needs: no weight is off by more than half the widest gap of the codebook.

    The slack is what the stored scale may be off: half a step of the scale's own type, or of the nested map.
    """
    k, n = 128, 64
    w = torch.randn(n, k)
    weight = quantize(w, variant.format.name, **variant.arguments())
    gaps = np.diff(np.sort(code_values(weight)))
    absmax = absmax_of_blocks(w, weight)[group_index(weight)]
    largest = np.abs(code_values(weight)).max()
    if variant.format.encoding is Encoding.SIGNED:
        largest -= variant.format.half_step  # absmax is this many steps
    error = (w.double() - exact_weight(weight)).abs().numpy()
    if variant.format.encoding is Encoding.UNSIGNED:
        step = exact_scales(weight)[group_index(weight)]
        assert bool((error <= step * (1 if variant.zero_type is ZeroType.INTEGER else 0.56)).all())
        return
    if variant.scale_type is ScaleType.E8M0:
        # OCP: the largest code is 6, so up to a quarter of the exponent's range is cut off.
        assert bool((error <= absmax / 4).all())
        return
    loss = {ScaleType.E4M4: 1 / 32, ScaleType.E4M3: 1 / 16, ScaleType.FP16: 2.0**-11, ScaleType.BF16: 2.0**-8}
    bound = absmax / largest * gaps.max() / 2 + absmax * loss.get(variant.scale_type, 2.0**-20)
    if variant.format.needs_codebook:
        top = np.sort(code_values(weight))  # one side of the codebook may be shorter than the other
        bound = bound + absmax * (1 - min(-top[0], top[-1]) / largest)
    if weight.nested_absmax is not None:
        bound = bound + weight.nested_absmax.max().item() * 0.01
    assert bool((error <= bound * (1 + 1e-6)).all())


@each_variant
def test_zeros_stay_zeros(variant: Variant) -> None:
    """A weight of zeros and, but for nested codebooks without a zero, each block of zeros."""
    n, k = 6, 256
    zeros = quantize(torch.zeros(n, k), variant.format.name, **variant.arguments())
    assert torch.equal(zeros.dequantize(), torch.zeros(n, k))
    assert torch.equal(zeros.pack().dequantize(), torch.zeros(n, k))
    w = torch.randn(n, k)
    w[1] = 0
    w[2] = -0.0
    weight = quantize(w, variant.format.name, **variant.arguments())
    assert torch.equal(weight.dequantize()[1:3], torch.zeros(2, k))
    assert bool(weight.dequantize()[0].any())


@each_format
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4], ids=str)
def test_any_magnitude_is_finite_and_no_worse_than_zero(fmt: Format, scale: float) -> None:
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    w = torch.randn(16, 128) * scale
    got = quantize(w, fmt.name, codebook=codebook).dequantize()
    assert bool(torch.isfinite(got).all())
    # Relative to 1, where squares of tiny numbers would vanish.
    assert ((w - got).double() / scale).norm() <= (w.double() / scale).norm()


@each_format
def test_largest_finite_weights(fmt: Format) -> None:
    """A finite weight of fp32's largest numbers: finite values, or an error that says what cannot hold them."""
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    w = torch.full((64, 64), 3e38)
    w[::2] *= -1
    for nested in {False, ScaleType.NESTED in fmt.scale_types}:
        try:
            weight = quantize(w, fmt.name, nested=nested, codebook=codebook)
        except ValueError as error:
            message = r"quantize: nested: expected absmax" if nested else r"quantize: scale_type: .*cannot hold a scale"
            assert re.match(message, str(error))  # noqa: PT017
        else:
            assert not bool(weight.dequantize().isnan().any()), f"nested={nested}"
            assert bool(weight.decode_scales().isfinite().all()), f"nested={nested}"


@each_variant
def test_any_strides(variant: Variant) -> None:
    """Transposed, strided, repeated and flipped weights quantize as their contiguous copies."""
    name, arguments = variant.format.name, variant.arguments()
    base = torch.randn(96, 160)
    views = [base.T, base[::2, ::3], base[:, 5:101], base[:1].expand(40, 160), base[:, :1].expand(96, 64)]
    views += [base.flip(1), base.as_strided((33, 64), (2, 1)), torch.randn(()).expand(3, 96)]
    for view in views:
        assert same_weight(quantize(view, name, **arguments), quantize(view.contiguous(), name, **arguments))


@each_format
@each_dtype
def test_dtypes(fmt: Format, dtype: torch.dtype) -> None:
    """fp16 and bf16 weights quantize as their fp32 values; float scales follow the weight's dtype."""
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    w = torch.randn(8, 100).to(dtype)
    weight = quantize(w, fmt.name, codebook=codebook)
    same = quantize(w.float(), fmt.name, codebook=codebook, scale_type=weight.scale_type)
    assert same_weight(weight, same)
    if fmt.encoding is not Encoding.CODEBOOK:
        assert weight.scales.dtype == dtype
    assert weight.dequantize(dtype).dtype == dtype
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


@each_variant
def test_dequantize_is_the_formats_meaning(variant: Variant) -> None:
    """Any stored weight: decode and scale, two or three fp32 roundings."""
    for k in (1, 70, 256):
        for group_size in variant.group_sizes(k):
            weight = random_weight(variant, 9, k, group_size)
            expected = exact_weight(weight)
            largest = np.abs(code_values(weight)).max() + (0 if weight.zeros is None else weight.zeros.abs().max())
            slack = 4 * 2.0**-24 * np.abs(exact_scales(weight))[group_index(weight)] * float(largest)
            if variant.scale_type is ScaleType.NESTED:
                slack = slack + 2.0**-22
            assert bool(((weight.dequantize().double() - expected).abs().numpy() <= slack).all())


@each_variant
@pytest.mark.parametrize(("n", "k"), [(9, 96), (5, 130)])
def test_chunks_do_not_show(variant: Variant, n: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are quantized and dequantized in pieces: the result is that of one piece."""
    whole = make_weight(variant, n, k)
    values = whole.dequantize()
    for chunk in (1, 100, 300):
        monkeypatch.setattr(quantize_module, "_CHUNK", chunk)
        monkeypatch.setattr(weight_module, "_CHUNK", chunk)
        pieces = make_weight(variant, n, k)
        assert same_weight(pieces, whole)
        assert torch.equal(pieces.dequantize(), values)


# ---- groups


@each_variant
def test_short_last_group_is_a_group(variant: Variant) -> None:
    """The rest of a row (of the weight, where blocks are flat) is quantized by itself."""
    k = 150
    w = torch.randn(4, k)
    for group_size in variant.group_sizes(k):
        weight = quantize(w, variant.format.name, group_size, **variant.arguments())
        if variant.scale_type in (ScaleType.NESTED, ScaleType.E4M3):
            continue  # all scales of a weight depend on each other
        start = k // group_size * group_size
        if variant.format.flat_blocks:
            end = 4 * k // group_size * group_size
            rest, got = w.reshape(-1)[end:], weight.dequantize().reshape(-1)[end:]
        else:
            rest, got = w[:, start:], weight.dequantize()[:, start:]
        if rest.numel() == 0:
            continue
        alone = quantize(rest.reshape(-1, rest.shape[-1]), variant.format.name, group_size=None, **variant.arguments())
        if alone.groups == 1:
            assert torch.equal(got.reshape(-1), alone.dequantize().reshape(-1))


@each_format
def test_group_size_of_a_row_and_default(fmt: Format) -> None:
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    w = torch.randn(2, 96)
    assert quantize(w, fmt.name, codebook=codebook).group_size == (fmt.group_size or 96)
    if fmt.group_sizes:
        with pytest.raises(ValueError, match=rf"quantize: group_size: {fmt.name} expects .*got 96 \(K=96\)"):
            quantize(w, fmt.name, -1, codebook=codebook)
    else:
        assert quantize(w, fmt.name, -1, codebook=codebook).group_size == 96


@each_format
@pytest.mark.parametrize("group_size", [0, -2, 1, 8, 48, 3 * 64, 100000])
def test_wrong_group_sizes(fmt: Format, group_size: int) -> None:
    codebook = user_codebook(fmt) if fmt.needs_codebook else None
    with pytest.raises(ValueError, match=rf"quantize: group_size: {fmt.name} expects .*, got {group_size} \(K=64\)"):
        quantize(torch.randn(4, 64), fmt.name, group_size, codebook=codebook)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 5.0])
@pytest.mark.parametrize("zero_type", ["integer", "float"])
def test_constant_groups_are_exact(value: float, zero_type: str) -> None:
    """Asymmetric: a constant is one step away from the zero point."""
    w = torch.full((3, 100), value)
    got = quantize(w, "uint4", zero_type=zero_type).dequantize()
    assert torch.allclose(got, w, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_integer_zero_of_one_sided_groups(sign: int) -> None:
    """The zero point is a code even if the group does not reach zero."""
    w = sign * (5 + torch.rand(4, 64))
    weight = quantize(w, "uint4", zero_type="integer")
    assert weight.zeros is not None
    assert set(weight.zeros.unique().tolist()) == ({0} if sign > 0 else {15})
    assert bool(((weight.dequantize() - w).abs() <= weight.scales.max() * 0.51).all())


# ---- HQQ


def lp_errors(w: torch.Tensor, weight: QuantizedWeight) -> np.ndarray:
    """sum |error|^0.7 of each group."""
    index = group_index(weight).reshape(-1)
    error = np.abs((w.double() - exact_weight(weight)).numpy().reshape(-1)) ** 0.7
    return np.bincount(index, weights=error)


def heavy_tailed(n: int, k: int) -> torch.Tensor:
    return torch.distributions.StudentT(3.0).sample((n, k))


@pytest.mark.parametrize("k", [256, 70, 65])
def test_hqq_lowers_the_error_of_every_group(k: int) -> None:
    """Never worse than round-to-nearest, short last groups included; clearly better on heavy tails."""
    w = heavy_tailed(64, k)
    before = lp_errors(w, quantize(w, "uint4", scale_type="fp32", zero_type="float"))
    after = lp_errors(w, quantize(w, "uint4", scale_type="fp32", method="hqq"))
    assert bool((after <= before * (1 + 1e-5) + 1e-5).all())
    assert after.sum() < 0.99 * before.sum()


def test_hqq_of_half_precision_scales_lowers_the_error() -> None:
    w = heavy_tailed(64, 256)
    for scale_type in ("fp16", "bf16"):
        before = lp_errors(w, quantize(w, "uint4", scale_type=scale_type, zero_type="float"))
        after = lp_errors(w, quantize(w, "uint4", scale_type=scale_type, method="hqq"))
        assert after.sum() < before.sum()


def test_hqq_has_float_zeros() -> None:
    assert quantize(torch.randn(4, 64), "uint4", method="hqq").zero_type is ZeroType.FLOAT
    with pytest.raises(ValueError, match=r"quantize: method 'hqq': zero_type: expected 'float', got 'integer'"):
        quantize(torch.randn(4, 64), "uint4", method="hqq", zero_type="integer")
    refused = [f for f in FORMATS.values() if ZeroType.FLOAT not in f.zero_types]
    assert refused
    for fmt in refused:
        with pytest.raises(
            ValueError, match=f"quantize: method 'hqq' expects a format with float zeros, got {fmt.name}"
        ):
            quantize(torch.randn(4, 64), fmt.name, method="hqq")


# ---- codebooks


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.encoding is Encoding.CODEBOOK])
def test_user_codebook(name: str) -> None:
    """In any order; it travels with the weight; the nearest entry is chosen."""
    table = user_codebook(FORMATS[name]).double().requires_grad_()
    weight = quantize(torch.randn(8, 64), name, codebook=table)
    assert weight.codebook is not None
    assert weight.codebook.dtype == torch.float32
    assert torch.equal(weight.values(), table.detach().float())
    assert not weight.codebook.requires_grad
    order = torch.randperm(FORMATS[name].levels)
    shuffled = quantize(torch.randn(8, 64), name, codebook=table[order])
    assert torch.equal(shuffled.values(), table.detach().float()[order])


def test_user_codebook_is_copied() -> None:
    table = torch.linspace(-1, 1, 16)
    weight = quantize(torch.randn(8, 64), "codebook4", codebook=table)
    before = weight.dequantize()
    table.zero_()
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize(
    "codebook",
    [torch.zeros(16), torch.ones(15), torch.ones(4, 4), torch.full((16,), torch.nan), torch.full((16,), torch.inf)],
    ids=["zeros", "short", "matrix", "nan", "inf"],
)
def test_wrong_codebooks(codebook: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"quantize: codebook: expected \[16\] finite values"):
        quantize(torch.randn(4, 64), "codebook4", codebook=codebook)


def test_ties_and_zero_blocks_in_bitsandbytes_bytes() -> None:
    """Known bytes: bitsandbytes' 4-bit layout (flat, the even element in the high nibble), built from our codes.

    One row of three blocks of 32: the sixteen NF4 values and the fifteen midpoints, which go to the lower code;
    zeros, which get code 7; the values in reverse, times an absmax of 0.5.
    """
    values = np.float32(FORMATS["nf4"].codebook)
    middle = np.float32((values[1:].astype(np.float64) + values[:-1]) / 2)
    row = np.concatenate([values, middle, [np.float32(1.0)], np.zeros(32), values[::-1] / 2, values[::-1] / 2])
    weight = quantize(torch.from_numpy(np.float32(row)).view(1, -1), "nf4", 32)
    assert weight.scales.tolist() == [[1.0, 0.0, 0.5]]
    codes = exact_codes(weight).reshape(-1).tolist()
    stored = bytes(codes[i] << 4 | codes[i + 1] for i in range(0, len(codes), 2))
    ramp, down = "0123456789abcdef", "fedcba9876543210"
    assert stored.hex() == ramp + "0123456789abcde" + "f" + "7" * 32 + down * 2


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_e2m1_ties_go_to_the_even_code(name: str) -> None:
    """OCP rounding, on both sides of zero; a largest value of 6 (and 448 more in NVFP4) makes the scale 1."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rounded = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    block = FORMATS[name].group_size
    w = torch.zeros(2, 2 * block)
    w[:, 0], w[:, block] = 6, 6 * 448 if name == "nvfp4" else 6
    w[0, 1:8], w[1, 1:8] = ties, -ties
    got = quantize(w, name).dequantize()
    assert torch.equal(got[0, 1:8], rounded)
    assert torch.equal(got[1, 1:8], -rounded)


def test_mxfp4_scales_are_those_of_ocp() -> None:
    """The exponent of absmax less that of E2M1's largest number, which is 2."""
    w = torch.randn(16, 96) * torch.exp2(torch.arange(16.0)[:, None] - 8)
    w[0, :32] = 0.5  # a power of two is its own exponent
    weight = quantize(w, "mxfp4")
    absmax = absmax_of_blocks(w, weight)
    assert np.array_equal(weight.scales.numpy().reshape(-1), np.floor(np.log2(absmax)) - 2 + 127)


def test_nvfp4_scales_use_the_range_of_e4m3() -> None:
    """The largest block has scale 448; the others absmax / 6, rounded to E4M3 (half a step: 1/16)."""
    w = torch.randn(16, 96) * torch.exp2(torch.arange(16.0)[:, None] / 4)
    weight = quantize(w, "nvfp4")
    assert weight.tensor_scale is not None
    assert abs(weight.tensor_scale.item() * 6 * 448 / w.abs().max().item() - 1) < 1e-6
    assert weight.scales.max().item() == 0x7E
    wanted = absmax_of_blocks(w, weight) / 6
    assert bool((np.abs(exact_scales(weight) / wanted - 1) <= 1 / 16).all())


# ---- bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_variant
def test_nan_and_inf(variant: Variant, bad: float) -> None:
    for where in ((0, 0), (3, 99), (2, 50)):
        w = torch.randn(4, 100)
        w[where] = bad
        with pytest.raises(ValueError, match=r"quantize: w: expected finite values, got NaN or Inf"):
            quantize(w, variant.format.name, **variant.arguments())


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (0, 4), (4, 0), (0, 0)])
def test_wrong_shapes(shape: tuple[int, ...]) -> None:
    message = re.escape(f"quantize: w: expected shape [N, K] with N, K >= 1, got {list(shape)}")
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64, torch.complex64])
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"quantize: w: expected a tensor of fp32, fp16 or bf16, got {dtype}"):
        quantize(torch.zeros(2, 2, dtype=dtype))


@pytest.mark.parametrize("value", [None, [[1.0]], np.ones((2, 2), np.float32), 1.0], ids=lambda v: type(v).__name__)
def test_no_tensor(value: object) -> None:
    with pytest.raises(TypeError, match=rf"quantize: w: .*got {type(value).__name__}"):
        quantize(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "nf5"}, r"quantize: format: expected one of nf4, .*, got 'nf5'"),
        ({"format": "codebook4"}, r"quantize: codebook: codebook4 expects \[16\] values, got none"),
        ({"format": "int4", "codebook": torch.ones(16)}, r"quantize: codebook: int4 has integer codes"),
        ({"scale_type": "fp8"}, r"quantize: scale_type: expected one of fp32, .*nested, got 'fp8'"),
        ({"scale_type": 3.5}, r"quantize: scale_type: expected one of .*, got 3\.5"),
        ({"scale_type": "e8m0"}, r"quantize: scale_type: nf4 expects one of fp32, .*, got e8m0"),
        ({"zero_type": "half"}, r"quantize: zero_type: expected one of none, integer, float, got 'half'"),
        ({"zero_type": "integer"}, r"quantize: zero_type: nf4 expects one of none, got integer"),
        ({"format": "uint4", "zero_type": "none"}, r"quantize: zero_type: uint4 expects one of integer, float"),
        ({"method": "gptq"}, r"quantize: method: expected 'rtn' or 'hqq', got 'gptq'"),
        ({"format": "int4", "nested": True}, r"quantize: scale_type: int4 expects one of .*, got nested"),
        ({"format": "mxfp4", "nested": True}, r"quantize: scale_type: mxfp4 expects one of e8m0, got nested"),
        ({"nested": True, "scale_type": "fp32"}, r"quantize: nested=True: expected no scale_type, got fp32"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_errors_name_function_and_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(4, 64), **arguments)


def test_a_scale_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"quantize: scale_type: fp16 cannot hold a scale of 1e\+05"):
        quantize(torch.full((2, 64), 1e5), "nf4", scale_type="fp16")


# ---- the canonical weight


def test_quantized_tensors_carry_no_graph() -> None:
    """Quantizing a parameter keeps neither its graph nor its memory."""
    w = torch.nn.Parameter(torch.randn(4, 64))
    assert VARIANTS
    attached = []
    for variant in VARIANTS:
        weight = quantize(w, variant.format.name, **variant.arguments())
        attached += [f"{variant}: {name}" for name, t in weight.tensors().items() if t.requires_grad]
        assert all(t.data_ptr() != w.data_ptr() for t in weight.tensors().values())
    assert attached == []


@each_variant
def test_bits_per_weight_and_repr(variant: Variant) -> None:
    n, k = 16, 512
    weight = make_weight(variant, n, k)
    stored = sum(t.numel() * t.element_size() for t in weight.tensors().values())
    assert weight.nbytes == stored
    assert weight.bits_per_weight == 8 * stored / (n * k)
    scale_bits = weight.scales.element_size() * 8 * weight.groups / k
    assert weight.bits_per_weight >= variant.format.bits + scale_bits
    text = repr(weight)
    assert text.startswith(f"QuantizedWeight({variant.format.name}, 16x512, group_size={weight.group_size}, ")
    assert f"scale={variant.scale_type.name.lower()}" in text
    assert f"{weight.bits_per_weight:.3f} bits per weight" in text
    assert ("zero=" in text) == (variant.zero_type is not ZeroType.NONE)
    assert weight.shape == (n, k)


def test_bits_per_weight_of_known_formats() -> None:
    """bitsandbytes at block size 64: 4.5, and 4.127 nested (the map's 1 KB vanishes in a large weight)."""
    w = torch.randn(512, 4096)
    assert quantize(w, "nf4").bits_per_weight == 4.5
    assert abs(quantize(w, "nf4", nested=True).bits_per_weight - 4.127) < 0.005
    assert quantize(w, "kbit3").bits_per_weight == 3.25


@each_variant
@pytest.mark.parametrize("k", [64, 100])
def test_state_dict_round_trip(variant: Variant, k: int) -> None:
    weight = random_weight(variant, 5, k)
    state = weight.state_dict("layer.weight.")
    assert all(name.startswith("layer.weight.") for name in state)
    assert state["layer.weight.quant_spec"].tolist() == [
        1,
        variant.format.id,
        variant.scale_type,
        variant.zero_type,
        weight.group_size,
        5,
        k,
    ]
    loaded = QuantizedWeight.from_state_dict({**state, "other": torch.ones(1)}, "layer.weight.")
    assert same_weight(weight, loaded)


@each_variant
def test_damaged_state_dicts(variant: Variant) -> None:
    """Each tensor missing, of a wrong shape or dtype, or one too many: ValueError naming the tensor."""
    prefix = "a.weight."
    good = random_weight(variant, 5, 100).state_dict(prefix)
    assert len(good) >= 3
    damaged = []
    for name, tensor in good.items():
        if name.endswith("codebook") and not variant.format.needs_codebook:
            continue
        damaged.append((name, {k: v for k, v in good.items() if k != name}))
        damaged.append((name, {**good, name: tensor.reshape(-1)[:-1]}))
        damaged.append((name, {**good, name: torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])}))
        damaged.append((name, {**good, name: tensor[None]}))
        wrong = torch.float64 if tensor.dtype != torch.float64 else torch.float32
        damaged.append((name, {**good, name: tensor.to(wrong)}))
    extra = {"zeros", "codebook", "nested_map", "nested_absmax", "nested_offset", "tensor_scale"}
    extra -= {name.removeprefix(prefix) for name in good}
    if variant.format.encoding is Encoding.CODEBOOK:
        extra -= {"codebook"}
    damaged += [(prefix + name, {**good, prefix + name: torch.ones(())}) for name in extra]
    for name, state in damaged:
        with pytest.raises(ValueError, match=f"QuantizedWeight: {name}: expected"):
            QuantizedWeight.from_state_dict(state, prefix)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 2, r"quant_spec: expected version 1, got 2"),
        (1, 99, r"quant_spec: .*format id.* got 99"),
        (1, -1, r"quant_spec: .*format id.* got -1"),
        (2, 99, r"quant_spec: unknown scale type 99"),
        (2, ScaleType.E8M0, r"scales: nf4 has no E8M0 scales"),
        (3, 99, r"quant_spec: unknown .*zero type 99"),
        (3, ZeroType.FLOAT, r"zeros: nf4 has no FLOAT zeros"),
        (4, 0, r"group_size: nf4 expects .*, got 0"),
        (4, -64, r"group_size: nf4 expects .*, got -64"),
        (4, 96, r"group_size: nf4 expects .*, got 96"),
        (4, 32, r"scales: expected"),
        (5, 0, r"shape: expected N, K >= 1, got 0 x 128"),
        (5, -1, r"shape: expected N, K >= 1"),
        (5, 9, r"codes: expected .*\[9, 64\], got .*\[8, 64\]"),
        (5, 2**62, r"codes: expected"),
        (6, 0, r"shape: expected N, K >= 1, got 8 x 0"),
        (6, 126, r"codes: expected"),
        (6, 2**62, r"codes: expected"),
    ],
)
def test_damaged_specs(place: int, value: int, message: str) -> None:
    state = make_weight(VARIANTS[0], 8, 128).state_dict("w.")
    state["w.quant_spec"][place] = value
    with pytest.raises(ValueError, match=r"QuantizedWeight: w\." + message):
        QuantizedWeight.from_state_dict(state, "w.")


def test_dequantize_in_float64_and_to_device() -> None:
    weight = make_weight(DEFAULTS[0], 4, 64)
    assert torch.equal(weight.dequantize(torch.float64).float(), weight.dequantize())
    assert same_weight(weight.to("cpu"), weight)
    assert str(weight.to("meta").device) == "meta"


def test_quantize_is_deterministic_and_leaves_the_weight_alone() -> None:
    assert DEFAULTS
    for variant in DEFAULTS:
        w = torch.randn(8, 100)
        copy = w.clone()
        first = quantize(w, variant.format.name, **variant.arguments())
        assert torch.equal(w, copy)
        assert same_weight(first, quantize(w, variant.format.name, **variant.arguments()))
