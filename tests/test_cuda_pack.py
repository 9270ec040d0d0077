"""The GPU packer writes the CPU packer's bytes, and back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import VARIANTS, Variant, each_variant, random_weight
from cuda_cases import cases, on_gpu, poison, same_bytes

pytestmark = pytest.mark.gpu


@each_variant
def test_bytes_are_the_cpu_packers(variant: Variant) -> None:
    """Padding included; every group size, tails of N and K."""
    for n, k, group_size in cases(variant):
        weight = random_weight(variant, n, k, group_size)
        expected = weight.pack()
        poison()
        packed = on_gpu(weight).pack()
        assert packed.device.type == "cuda"
        assert same_bytes(packed, expected), (n, k, group_size)


@each_variant
def test_unpack_is_the_inverse(variant: Variant) -> None:
    for n, k, group_size in cases(variant):
        weight = random_weight(variant, n, k, group_size)
        packed = on_gpu(weight).pack()
        poison()
        assert same_bytes(packed.unpack(), weight), (n, k, group_size)


@each_variant
def test_tail_bits_travel_as_on_the_cpu(variant: Variant) -> None:
    """Bits behind the last code of a row may hold anything in a file."""
    weight = random_weight(variant, 5, 37)
    used = 37 * variant.format.bits % 8
    codes = weight.codes.clone()
    if used:
        codes[:, -1] |= 256 - (1 << used)
    dirty = replace(weight, codes=codes)
    assert same_bytes(on_gpu(dirty).pack(), dirty.pack())


@each_variant
def test_rows_at_any_address(variant: Variant) -> None:
    """Codes that begin at an odd address, as in a slice of a file's buffer."""
    weight = random_weight(variant, 66, 512)
    for offset in (1, 4, 8):
        buffer = torch.empty(weight.codes.numel() + offset, dtype=torch.uint8, device="cuda")
        codes = buffer[offset:].view(weight.codes.shape)
        codes.copy_(weight.codes)
        assert codes.data_ptr() % 16 == offset
        assert same_bytes(replace(on_gpu(weight), codes=codes).pack(), weight.pack())


def test_another_stream() -> None:
    """Work is queued on the current stream: behind a long kernel there, and nothing waits for another stream."""
    weight = random_weight(VARIANTS[0], 512, 512)
    expected = weight.pack()
    codes = torch.zeros_like(weight.codes, device="cuda")
    gpu = replace(on_gpu(weight), codes=codes)
    late = weight.codes.cuda()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        codes.copy_(late)
        packed = gpu.pack()
        unpacked = packed.unpack()
    assert not stream.query()  # packing did not wait
    stream.synchronize()
    assert same_bytes(packed, expected)
    assert same_bytes(unpacked, weight)


def test_cuda_graph() -> None:
    weight = on_gpu(random_weight(VARIANTS[0], 130, 512))
    weight.pack()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packed = weight.pack()
    weight.codes.bitwise_xor_(0xFF)
    packed.codes.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert same_bytes(packed, weight.to("cpu").pack())


@pytest.mark.parametrize("name", ["nf4-fp32", "kbit3-e4m4", "int8-fp16"])
def test_more_than_two_gigabytes(name: str) -> None:
    """N * K beyond 2^31 codes, bytes beyond 2^31: the last rows are where they belong."""
    variant = next(v for v in VARIANTS if str(v) == name)
    bits, k = variant.format.bits, 8192
    n = (2**31 + 2**27) * 8 // bits // k // 64 * 64 + 5
    rows = 69
    small = random_weight(variant, rows, k)
    codes = torch.zeros(n, small.codes.shape[1], dtype=torch.uint8, device="cuda")
    scales = torch.zeros(n, small.scales.shape[1], dtype=small.scales.dtype, device="cuda")
    codes[-rows:] = small.codes.cuda()
    scales[-rows:] = small.scales.cuda()
    assert codes.numel() > 2**31
    weight = replace(on_gpu(small), n=n, codes=codes, scales=scales)
    packed = weight.pack()
    expected = small.pack()  # the last 69 rows begin a slab
    assert torch.equal(packed.codes[-expected.codes.numel() :].cpu(), expected.codes)
    assert torch.equal(packed.scales[-expected.scales.numel() :].cpu(), expected.scales)
    assert torch.equal(packed.dequantize(torch.bfloat16)[-rows:].cpu(), small.dequantize(torch.bfloat16))
    unpacked = packed.unpack()
    assert torch.equal(unpacked.codes, codes)
    assert torch.equal(unpacked.scales, scales)


def test_tensors_of_two_devices_are_refused() -> None:
    weight = random_weight(VARIANTS[0], 8, 128)
    mixed = replace(on_gpu(weight), scales=weight.scales)
    with pytest.raises(RuntimeError, match=r"pack: scales: expected .* CUDA:0 .*, got CPU"):
        mixed.pack()
    with pytest.raises(RuntimeError, match=r"pack: weight\.codes_bytes: expected 512, got 448"):
        replace(on_gpu(weight), codes=weight.codes[:-1].cuda()).pack()
