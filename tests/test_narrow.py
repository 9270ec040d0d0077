"""Parts of weights for tensor parallelism: every value as in the whole, and errors that say what does not divide."""

from __future__ import annotations

import pytest
import torch
from conftest import VARIANTS, Variant, each_variant, exact_weight, random_weight, raw, same_weight

from pyquant import QuantizedWeight
from pyquant.formats import ScaleType


def variant(name: str) -> Variant:
    return next(v for v in VARIANTS if str(v) == name)


def assert_part(weight: QuantizedWeight, dim: int, start: int, length: int) -> QuantizedWeight:
    """The part dequantizes to that part of the whole bit for bit, before and after packing."""
    whole, part = weight.dequantize(), weight.narrow(dim, start, length)
    expected = whole.narrow(dim, start, length)
    assert torch.equal(part.dequantize(), expected)
    exact = exact_weight(weight)
    torch.testing.assert_close(
        exact_weight(part), exact.narrow(dim, start, length), rtol=0, atol=1e-6 * exact.abs().max()
    )
    packed = weight.pack().narrow(dim, start, length)
    assert same_weight(packed.unpack(), part)
    assert torch.equal(packed.dequantize(), expected)
    return part


@each_variant
def test_rows(variant: Variant) -> None:
    for k, group_size in ((128, None), (70, None)):  # 70: groups that cross row ends, or short ones
        weight = random_weight(variant, 96, k, group_size)
        for start, length in ((0, 48), (48, 48), (32, 64), (0, 96)):
            if weight.flat_scales and start * k % weight.group_size != 0:
                continue  # test_rows_inside_flat_blocks
            part = assert_part(weight, 0, start, length)
            assert part.group_size == weight.group_size
            assert part.format is weight.format


@each_variant
def test_columns(variant: Variant) -> None:
    checked = 0
    for group_size in variant.group_sizes(256):
        weight = random_weight(variant, 33, 256, group_size)
        for start, length in ((0, 128), (128, 128), (64, 64), (192, 64)):
            if not (group_size <= length or variant.format.allows_group(length, length)):
                continue
            part = assert_part(weight, 1, start, length)
            assert part.group_size == min(group_size, length)
            checked += 1
    assert checked


@each_variant
def test_parts_of_all_ranks_make_the_whole(variant: Variant) -> None:
    weight = random_weight(variant, 64, 256)
    for dim in (0, 1):
        parts = [weight.shard(dim, rank, 2).dequantize() for rank in range(2)]
        assert torch.equal(torch.cat(parts, dim), weight.dequantize())


def test_nested_scales_along_n_stay_nested_where_they_can() -> None:
    weight = random_weight(variant("nf4-nested"), 256, 256)  # 4 scales a row: 64 rows share a second-level scale
    assert assert_part(weight, 0, 128, 128).scale_type is ScaleType.NESTED
    assert assert_part(weight, 0, 0, 10).scale_type is ScaleType.NESTED
    assert assert_part(weight, 0, 32, 64).scale_type is ScaleType.FP32
    assert assert_part(weight, 1, 128, 128).scale_type is ScaleType.FP32


def test_rows_inside_flat_blocks() -> None:
    """K = 96 in blocks of 64: an odd row starts inside a block, so the part has blocks of 32."""
    for name in ("nf4-fp32", "nf4-nested"):
        weight = random_weight(variant(name), 31, 96, 64)
        assert weight.flat_scales
        assert assert_part(weight, 0, 2, 7).group_size == 64
        part = assert_part(weight, 0, 3, 7)
        assert part.group_size == 32
        assert not part.flat_scales
        assert assert_part(weight, 1, 32, 64).group_size == 32


def test_edges_inside_groups() -> None:
    """18944 columns in groups of 128 on 8 ranks: each rank's 2368 columns are 18.5 groups."""
    weight = random_weight(variant("int4-fp16"), 3, 18944, 128)
    for rank in (0, 1, 7):
        assert assert_part(weight, 1, rank * 2368, 2368).group_size == 64


def test_the_short_last_group() -> None:
    weight = random_weight(variant("uint4-fp16-integer"), 5, 100, 32)
    assert assert_part(weight, 1, 96, 4).group_size == 4
    assert assert_part(weight, 1, 32, 68).group_size == 32
    assert assert_part(weight, 1, 0, 64).group_size == 32


@pytest.mark.parametrize("name", ["kbit3-e4m4", "kbit5-fp32"])
def test_codes_that_do_not_start_at_a_byte(name: str) -> None:
    weight = random_weight(variant(name), 5, 256)
    assert assert_part(weight, 1, 32, 96).codes.shape == (5, 96 * weight.format.bits // 8)
    odd = random_weight(variant("int4-fp16"), 5, 35, 35)
    assert assert_part(odd, 1, 3, 5).group_size == 5


def test_a_part_does_not_keep_the_whole_alive() -> None:
    weight = random_weight(variant("nf4-nested"), 256, 256)
    row = weight.narrow(0, 0, 1)
    parts = [weight.narrow(0, 128, 128), weight.narrow(0, 0, 256), weight.narrow(1, 128, 128), row.narrow(1, 128, 128)]
    for part in parts:
        for name, tensor in part.tensors().items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
            if name in ("codes", "scales"):
                assert raw(tensor).data_ptr() != raw(getattr(weight, name)).data_ptr()


@pytest.mark.parametrize(
    ("name", "shape", "group_size", "arguments", "message"),
    [
        ("nf4-fp32", (33, 128), 64, (0, 0, 2), r"shard: N=33 does not divide by world_size=2"),
        ("nf4-fp32", (32, 192), 64, (1, 0, 5), r"shard: K=192 does not divide by world_size=5"),
        ("nf4-fp32", (32, 64), 64, (0, 2, 2), r"shard: rank: expected 0\.\.1, got 2"),
        ("nf4-fp32", (32, 64), 64, (2, 0, 2), r"shard: dim: expected 0 \(N\) or 1 \(K\), got 2"),
        (
            "nf4-fp32",
            (32, 192),
            64,
            (1, 1, 12),
            r"narrow: columns 16 \.\. 32 of K=192 with groups of 64: nf4 expects groups of 32 or .*groups of 16 hold",
        ),
        (
            "mxfp4-e8m0",
            (32, 96),
            32,
            (1, 0, 2),
            r"columns 0 \.\. 48 .*mxfp4 expects groups of 32, and only groups of 16",
        ),
        ("nf4-fp32", (32, 70), 64, (0, 1, 2), None),
        ("nf4-fp32", (31, 70), 64, (1, 1, 2), r"columns 35 \.\. 70 of K=70 with groups that cross row ends of 64"),
    ],
)
def test_errors(
    name: str, shape: tuple[int, int], group_size: int, arguments: tuple[int, int, int], message: str | None
) -> None:
    weight = random_weight(variant(name), *shape, group_size)
    for form in (weight, weight.pack()):
        if message is None:  # 16 rows of 70 are 17.5 blocks
            with pytest.raises(ValueError, match=r"columns 0 \.\. 70 of K=70 with groups that cross row ends of 64"):
                form.shard(*arguments)
            continue
        with pytest.raises(ValueError, match=message):
            form.shard(*arguments)


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (30, 4), (0, 0), (0, 33)])
def test_a_range_outside_is_an_error(start: int, length: int) -> None:
    weight = random_weight(variant("nf4-fp32"), 32, 64)
    with pytest.raises(ValueError, match=rf"narrow: expected a part of N=32, got {start} \.\. {start + length}"):
        weight.narrow(0, start, length)


@pytest.mark.gpu
@each_variant
def test_on_the_gpu(variant: Variant) -> None:
    """The same parts as on the CPU, bit for bit."""
    weight = random_weight(variant, 64, 256)
    for dim in (0, 1):
        expected = weight.shard(dim, 1, 2)
        packed = weight.pack("cuda").shard(dim, 1, 2)
        assert packed.device.type == "cuda"
        assert same_weight(packed.unpack().to("cpu"), expected)
        assert torch.equal(packed.dequantize().cpu(), expected.dequantize())
