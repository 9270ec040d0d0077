"""Quantizing on the GPU: the CPU's codes and scales."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import VARIANTS, Variant, each_dtype, each_variant, user_codebook
from cuda_cases import cases, poison, same_bytes

from pyquant import QuantizedWeight, quantize
from pyquant.formats import FORMATS, ScaleType, ZeroType
from pyquant.scales import decode_absmax_e4m4, decode_e4m3, encode_absmax_e4m4, encode_e4m3

pytestmark = pytest.mark.gpu
# The offset of nested scales is a mean, summed in another order: equal to some units in the last place of the
# largest absmax, and with it what is computed from it.
NESTED_SLACK = 8 * 2.0**-24


def assert_same(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Bit for bit; nested scales by their values, since an index may fall to the other side of a boundary."""
    got = got.to("cpu")
    if expected.scale_type is not ScaleType.NESTED:
        assert same_bytes(got, expected)
        return
    assert torch.equal(got.codes, expected.codes)
    assert got.nested_map is not None
    assert expected.nested_map is not None
    assert got.nested_absmax is not None
    assert expected.nested_absmax is not None
    assert got.nested_offset is not None
    assert expected.nested_offset is not None
    assert torch.equal(got.nested_map, expected.nested_map)
    largest = expected.nested_offset.abs() + expected.nested_absmax.abs().max()
    slack = float(largest) * NESTED_SLACK
    assert float((got.nested_offset - expected.nested_offset).abs()) <= slack
    assert bool(((got.nested_absmax - expected.nested_absmax).abs() <= slack).all())
    changed = got.scales != expected.scales
    assert float(changed.float().mean()) <= 1e-3 or int(changed.sum()) <= 1
    assert bool(((got.scales.int() - expected.scales.int()).abs() <= 1).all())
    same = ~changed
    difference = (got.decode_scales() - expected.decode_scales()).abs()[same]
    assert difference.numel() == 0 or float(difference.max()) <= 4 * slack


@each_dtype
@each_variant
def test_codes_and_scales_are_the_cpus(variant: Variant, dtype: torch.dtype) -> None:
    for n, k, group_size in cases(variant):
        w = torch.randn(n, k).to(dtype)
        expected = quantize(w, variant.format.name, group_size, **variant.arguments())
        poison()
        got = quantize(w.cuda(), variant.format.name, group_size, **variant.arguments())
        assert got.device.type == "cuda"
        got.check()
        assert_same(got, expected)


@each_variant
def test_long_groups(variant: Variant) -> None:
    """Beyond the 256 weights that stay in registers."""
    k = 5000
    w = torch.randn(7, k, dtype=torch.bfloat16)
    sizes = [g for g in (*variant.format.group_sizes, 512, 4096, k) if variant.format.allows_group(g, k)]
    assert sizes
    for group_size in sizes:
        expected = quantize(w, variant.format.name, group_size, **variant.arguments())
        assert_same(quantize(w.cuda(), variant.format.name, group_size, **variant.arguments()), expected)


@each_variant
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-6, 3e3, 1e30], ids=str)
def test_any_magnitude(variant: Variant, scale: float) -> None:
    """Subnormal scales, scales that saturate, scales that do not fit."""
    w = torch.randn(16, 256) * torch.exp2(torch.arange(16.0)[:, None] - 8) * scale
    w[3] = 0
    w[4, :64] = -0.0
    try:
        expected = quantize(w, variant.format.name, **variant.arguments())
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            quantize(w.cuda(), variant.format.name, **variant.arguments())
        return
    assert_same(quantize(w.cuda(), variant.format.name, **variant.arguments()), expected)


@each_variant
def test_ties_and_steps(variant: Variant) -> None:
    """Values on a grid, where ties are common; also constants, one-sided groups and zeros."""
    w = torch.randint(-16, 17, (32, 256)).float() / 4
    w[1], w[2], w[3] = 0.0, 3.0, w[3].abs()
    w[4] = -w[4].abs() - 1
    for dtype in (torch.float32, torch.float16):
        expected = quantize(w.to(dtype), variant.format.name, **variant.arguments())
        assert_same(quantize(w.to(dtype).cuda(), variant.format.name, **variant.arguments()), expected)


@pytest.mark.parametrize("name", [f.name for f in FORMATS.values() if f.codebook is not None])
def test_own_codebook(name: str) -> None:
    """In any order, on any device; a copy travels with the weight."""
    w = torch.randn(9, 96)
    table = user_codebook(FORMATS[name])
    expected = quantize(w, name, codebook=table)
    for codebook in (table, table.cuda()):
        got = quantize(w.cuda(), name, codebook=codebook)
        assert_same(got, expected)
        assert got.codebook is not None
        assert got.codebook.device.type == "cuda"
        assert got.codebook.data_ptr() != codebook.data_ptr()


@each_variant
def test_any_strides(variant: Variant) -> None:
    base = torch.randn(96, 160)
    gpu = base.cuda()
    views = [lambda t: t.T, lambda t: t[::2, ::3], lambda t: t[:, 5:101], lambda t: t[:1].expand(40, 160)]
    views += [lambda t: t[:, :128], lambda t: t[1::2], lambda t: t.as_strided((33, 64), (2, 1))]
    for view in views:
        expected = quantize(view(base), variant.format.name, **variant.arguments())
        assert_same(quantize(view(gpu), variant.format.name, **variant.arguments()), expected)


def test_every_e4m4_and_e4m3_scale() -> None:
    """Absmax on every code, between codes and at the ties: encoded as on the CPU."""
    codes = torch.arange(256, dtype=torch.uint8)
    for values, encode, name, factor in (
        (decode_absmax_e4m4(codes), encode_absmax_e4m4, "nf4", 1.0),
        (decode_e4m3(codes[:0x7F]), encode_e4m3, "nvfp4", 6.0),
    ):
        middle = (values[1:] + values[:-1]) / 2
        near = torch.cat([values, middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)])
        w = torch.zeros(near.numel(), 64)
        w[:, 5] = near * factor
        if name == "nvfp4":
            w[0, 5] = 448 * 6  # makes the tensor scale 1
            near[0] = 448
        got = quantize(w.cuda(), name, scale_type="e4m4" if name == "nf4" else None)
        assert torch.equal(got.scales[:, 0].cpu(), encode(near))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_variant
def test_nan_and_inf(variant: Variant, bad: float) -> None:
    for shape in ((4, 100), (3, 1024)):
        for where in ((0, 0), (2, shape[1] - 1), (1, 50)):
            w = torch.randn(shape, device="cuda")
            w[where] = bad
            with pytest.raises(ValueError, match=r"quantize: w: expected finite values, got NaN or Inf"):
                quantize(w, variant.format.name, **variant.arguments())


def test_scales_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"quantize: scale_type: fp16 cannot hold a scale of 1e\+05"):
        quantize(torch.full((2, 64), 1e5, device="cuda"), "nf4", scale_type="fp16")
    with pytest.raises(ValueError, match=r"quantize: nested: expected absmax"):
        quantize(torch.full((64, 64), 3e38, device="cuda"), "nf4", nested=True)


def test_arguments_are_checked_as_on_the_cpu() -> None:
    w = torch.randn(4, 64, device="cuda")
    with pytest.raises(ValueError, match=r"quantize: codebook: codebook4 expects \[16\] values, got none"):
        quantize(w, "codebook4")
    with pytest.raises(ValueError, match=r"quantize: codebook: expected \[16\] finite values"):
        quantize(w, "nf4", codebook=torch.zeros(16, device="cuda"))
    with pytest.raises(ValueError, match=r"quantize: group_size: nf4 expects .*, got 48"):
        quantize(w, "nf4", 48)
    with pytest.raises(TypeError, match=r"quantize: w: expected a tensor of fp32, fp16 or bf16"):
        quantize(w.double())


def test_same_bits_every_time_and_the_weight_is_left_alone() -> None:
    w = torch.randn(512, 1024, device="cuda")
    copy = w.clone()
    first = quantize(w, "nf4", nested=True)
    for _ in range(5):
        assert same_bytes(quantize(w, "nf4", nested=True), first)
    assert torch.equal(w, copy)


def test_nothing_is_shared_between_weights() -> None:
    """Files of several weights must not hold views of one tensor."""
    w = torch.randn(64, 64, device="cuda", requires_grad=True)
    a, b = quantize(w, "nf4", nested=True), quantize(w, "nf4", nested=True)
    pointers = [t.untyped_storage().data_ptr() for weight in (a, b) for t in weight.tensors().values()]
    assert len(set(pointers)) == len(pointers)
    assert not any(t.requires_grad for t in a.tensors().values())


def test_another_stream() -> None:
    w = torch.zeros(512, 512, device="cuda")
    late = torch.randn(512, 512)
    on_device = late.cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        w.copy_(on_device)
        got = quantize(w, "nf4")
    assert_same(got, quantize(late, "nf4"))


@pytest.mark.parametrize("name", ["nf4-nested", "kbit5-e4m4", "uint4-fp16-float", "int8-fp16"])
def test_more_than_two_billion_weights(name: str) -> None:
    """N * K beyond 2^31: every piece is what it is alone; no temporary as large as the weight."""
    variant = next(v for v in VARIANTS if str(v) == name)
    k, n = 8192, 2**18 + 192
    w = torch.randn(4096, k, dtype=torch.bfloat16, device="cuda").repeat(n // 4096 + 1, 1)[:n]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = quantize(w, variant.format.name, **variant.arguments())
    assert torch.cuda.max_memory_allocated() - before <= got.nbytes + w.nbytes // 16
    some = quantize(w[:4096], variant.format.name, **variant.arguments())
    for start in (0, 2**18 - 4096):
        assert torch.equal(got.codes[start : start + 4096], some.codes)
        if variant.scale_type is not ScaleType.NESTED:
            assert torch.equal(got.scales[start : start + 4096], some.scales)
    last = n // 4096 * 4096
    assert torch.equal(got.codes[last:], some.codes[: n - last])
    if variant.zero_type is not ZeroType.NONE:
        assert got.zeros is not None
        assert some.zeros is not None
        assert torch.equal(got.zeros[last:], some.zeros[: n - last])
    assert got.codes.numel() * 8 // variant.format.bits > 2**31
    if variant.scale_type is not ScaleType.NESTED:
        assert torch.equal(got.dequantize(torch.bfloat16)[last:], some.dequantize(torch.bfloat16)[: n - last])
