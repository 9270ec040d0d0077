"""Dequantizing on the GPU: the CPU's bits, from both layouts."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from conftest import VARIANTS, Variant, c_library, c_weight, each_dtype, each_variant, random_weight, raw
from cuda_cases import cases, on_gpu, poison

pytestmark = pytest.mark.gpu
CX_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@each_dtype
@each_variant
def test_bits_are_the_cpus(variant: Variant, dtype: torch.dtype) -> None:
    """The pure torch path and the CPU kernel agree with the GPU on both layouts."""
    for n, k, group_size in cases(variant):
        weight = random_weight(variant, n, k, group_size)
        expected = weight.dequantize(dtype)
        assert torch.equal(weight.pack().dequantize(dtype), expected)
        gpu = on_gpu(weight)
        packed = gpu.pack()
        for source in (gpu, packed):
            poison()
            got = source.dequantize(dtype)
            assert got.dtype == dtype
            assert torch.equal(raw(got.cpu()), raw(expected)), (type(source).__name__, n, k, group_size)


@each_variant
def test_float64_takes_the_torch_path(variant: Variant) -> None:
    weight = random_weight(variant, 9, 100)
    assert torch.equal(on_gpu(weight).dequantize(torch.float64).cpu(), weight.dequantize(torch.float64))


def test_own_codebook_in_place_of_the_formats() -> None:
    names = [v for v in VARIANTS if v.format.codebook is not None and v.scale_type is v.format.scale_types[0]]
    assert names
    for variant in names:
        weight = random_weight(variant, 70, 150)
        own = replace(weight, codebook=torch.randn(variant.format.levels))
        expected = own.dequantize()
        assert not torch.equal(expected, weight.dequantize())
        assert torch.equal(on_gpu(own).dequantize().cpu(), expected)
        assert torch.equal(on_gpu(own).pack().dequantize().cpu(), expected)


@each_dtype
@pytest.mark.parametrize("canonical", [False, True])
@pytest.mark.parametrize(("k", "ld", "offset"), [(150, 150, 0), (150, 157, 1), (256, 264, 8), (256, 256, 3), (1, 5, 0)])
def test_leading_dimension_and_alignment(dtype: torch.dtype, canonical: bool, k: int, ld: int, offset: int) -> None:
    """Only [N, K] is written, whatever the rows' distance and address."""
    weight = random_weight(VARIANTS[0], 67, k)
    source = on_gpu(weight) if canonical else on_gpu(weight).pack()
    struct = c_weight(source if not canonical else on_gpu(weight).pack())
    if canonical:
        struct.layout = 0
        struct.codes, struct.codes_bytes = source.codes.data_ptr(), source.codes.nbytes
        struct.scales, struct.scales_bytes = source.scales.data_ptr(), source.scales.nbytes
    out = torch.full((offset + 67 * ld,), -77.0, dtype=dtype, device="cuda")
    library = c_library()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    status = library.cx_dequantize(
        ctypes.byref(struct),
        CX_DTYPES[dtype],
        ctypes.c_void_p(out.data_ptr() + offset * out.element_size()),
        ctypes.c_int64(ld),
        1,
        stream,
        -1,
        0,
    )
    assert status == 0, library.cx_last_error()
    expected = torch.full_like(out, -77.0)
    expected[offset:].view(67, ld)[:, :k] = weight.dequantize(dtype).cuda()
    assert torch.equal(out, expected)


def test_nan_scales_stay_nan() -> None:
    """E8M0 255 and E4M3 0x7F are NaN."""
    for name, code in (("mxfp4-e8m0", 255), ("nvfp4-e4m3", 0x7F)):
        variant = next(v for v in VARIANTS if str(v) == name)
        weight = random_weight(variant, 5, 128)
        weight.scales[2, 1] = code
        expected = weight.dequantize()
        assert int(expected.isnan().sum()) == weight.group_size
        for source in (on_gpu(weight), on_gpu(weight).pack()):
            for dtype in CX_DTYPES:
                got = source.dequantize(dtype).float().cpu()
                assert torch.equal(got.isnan(), expected.isnan())


def test_another_stream_and_graph() -> None:
    weight = random_weight(VARIANTS[0], 512, 512)
    expected = weight.dequantize()
    packed = on_gpu(weight).pack()
    late = packed.codes.clone()
    packed.codes.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        packed.codes.copy_(late)
        got = packed.dequantize()
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(got.cpu(), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = packed.dequantize()
    got.zero_()
    graph.replay()
    assert torch.equal(got.cpu(), expected)
