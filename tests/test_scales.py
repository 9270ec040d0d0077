"""Encodings of scales: every 8-bit code, rounding at every boundary, nested absmax against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import VARIANTS, Variant, exact_scales, make_weight, random_weight

from pyquant import quantize
from pyquant.formats import ScaleType
from pyquant.scales import (
    decode_absmax_e4m4,
    decode_e4m3,
    decode_e8m0,
    dynamic_map,
    encode_absmax_e4m4,
    encode_e4m3,
    encode_e8m0,
    nest_absmax,
    storage_dtype,
    unnest_absmax,
)

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
_E, _M = np.arange(256) >> 4, np.arange(256) & 15
E4M4 = np.where(_E > 0, 2.0 ** (_E - 11) * (1 + _M / 16), _M * 2.0**-14)
_E, _M = np.arange(127) >> 3, np.arange(127) & 7
E4M3 = np.where(_E > 0, 2.0 ** (_E - 7) * (1 + _M / 8), _M * 2.0**-9)


def around_boundaries(values: np.ndarray) -> np.ndarray:
    """fp32 numbers: the values, the midpoints of neighbours and the next number on both sides of each; a dense grid."""
    midpoints = (values[1:] + values[:-1]) / 2
    points = np.float32(np.concatenate([values, midpoints]))
    assert np.array_equal(points.astype(np.float64), np.concatenate([values, midpoints]))  # none was rounded
    nearby = [np.nextafter(points, np.float32(-1)).clip(0), points, np.nextafter(points, np.float32(np.inf))]
    grid = np.exp(np.random.default_rng(0).uniform(np.log(1e-8), np.log(values[-1] * 4), 20000))
    return np.float32(np.concatenate([*nearby, grid, [0, 1e-45, 3e38, np.inf]]))


def nearest_even(a: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Brute force: the code of the nearest value, the even code if two are equally near. Saturates."""
    clipped = np.minimum(a.astype(np.float64), values[-1])
    distance = np.abs(clipped[:, None] - values[None, :])
    best = distance.min(axis=1, keepdims=True)
    candidates = distance == best
    even = candidates & (np.arange(len(values)) % 2 == 0)
    return np.where(even.any(axis=1), even.argmax(axis=1), candidates.argmax(axis=1))


def test_e4m4_decodes_every_code() -> None:
    assert np.array_equal(decode_absmax_e4m4(ALL_BYTES).double().numpy(), E4M4)


def test_e4m4_encodes_to_the_nearest() -> None:
    """Nearest even, with a carry into the exponent, subnormals, and saturation at 31."""
    a = around_boundaries(E4M4)
    codes = encode_absmax_e4m4(torch.from_numpy(a)).numpy()
    assert np.array_equal(codes, nearest_even(a, E4M4))
    assert set(codes.tolist()) == set(range(256))


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0),
        (31.0, 255),
        (31.49, 255),
        (32.0, 255),
        (33.0, 255),
        (100.0, 255),
        (1.0, 0xB0),
        (2.0**-10, 16),
        # A mantissa of 31.5/32 carries: bitsandbytes clamps it to 15/16.
        (2 - 1 / 64, 0xC0),
        (1 - 1 / 128, 0xB0),
        (15.5 * 2.0**-14, 16),
        (2.0**-15, 0),
        (1.5 * 2.0**-14, 2),
    ],
)
def test_e4m4_known_codes(value: float, code: int) -> None:
    assert encode_absmax_e4m4(torch.tensor([value])).item() == code


@pytest.mark.parametrize("bad", [-1.0, -1e-30, float("nan"), float("-inf")])
def test_e4m4_refuses_what_is_no_absmax(bad: float) -> None:
    with pytest.raises(ValueError, match=r"encode_absmax_e4m4: absmax: expected values >= 0"):
        encode_absmax_e4m4(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_e4m4_takes_any_floating_dtype_and_shape(dtype: torch.dtype) -> None:
    a = torch.rand(3, 5, 7).to(dtype)
    codes = encode_absmax_e4m4(a.transpose(0, 1))
    assert torch.equal(codes, encode_absmax_e4m4(a.float()).transpose(0, 1))
    assert encode_absmax_e4m4(a[:0]).shape == (0, 5, 7)


def test_e4m3() -> None:
    assert np.array_equal(decode_e4m3(ALL_BYTES[:127]).double().numpy(), E4M3)
    assert bool(decode_e4m3(torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).isnan().all())
    a = around_boundaries(E4M3)
    codes = encode_e4m3(torch.from_numpy(a)).numpy()
    assert np.array_equal(codes, nearest_even(a, E4M3))
    assert set(codes.tolist()) == set(range(127))


def test_e8m0() -> None:
    values = decode_e8m0(ALL_BYTES)
    assert np.array_equal(values[:255].double().numpy(), 2.0 ** (np.arange(255) - 127.0))
    assert bool(values[255].isnan())
    exponents = torch.arange(-300, 300)
    expected = np.clip(np.arange(-300, 300), -127, 127) + 127
    assert np.array_equal(encode_e8m0(exponents).numpy(), expected)


@pytest.mark.parametrize("scale_type", list(ScaleType), ids=lambda t: t.name)
def test_storage_is_as_wide_as_the_c_api_says(scale_type: ScaleType) -> None:
    width = {ScaleType.FP32: 4, ScaleType.FP16: 2, ScaleType.BF16: 2}.get(scale_type, 1)
    assert storage_dtype(scale_type).itemsize == width


BYTE_SCALES = [v for v in VARIANTS if v.scale_type in (ScaleType.E4M4, ScaleType.E4M3, ScaleType.E8M0)]


@pytest.mark.parametrize("variant", BYTE_SCALES, ids=str)
@pytest.mark.parametrize("k", [64, 40], ids=["rows", "over row ends"])
def test_the_kernel_decodes_every_scale_code(variant: Variant, k: int) -> None:
    """All 256 bytes, NaN codes and products beyond fp32's range included, bit for bit."""
    weight = random_weight(variant, 512, k)
    scales = torch.arange(weight.scales.numel()).remainder(256).to(torch.uint8).view_as(weight.scales)
    weight = type(weight)(**{**vars(weight), "scales": scales})
    expected, got = weight.dequantize(), weight.pack().dequantize()
    assert len(scales.unique()) == 256
    assert torch.equal(expected.isnan(), got.isnan())
    assert torch.equal(expected.nan_to_num(nan=0.0, posinf=1e39, neginf=-1e39), got.nan_to_num(0.0, 1e39, -1e39))


def test_dynamic_map() -> None:
    """The facts of bitsandbytes' map, and its formula in numpy."""
    values = np.array(dynamic_map())
    assert len(values) == len(set(values)) == 256
    assert (values < 0).sum() == 127
    assert (values > 0).sum() == 128
    assert np.array_equal(values, np.sort(values))
    assert abs(values[0] - -0.99296874) < 1e-8
    assert values[255] == 1.0
    assert abs(np.abs(values[values != 0]).min() - 5.5e-7) < 1e-12
    expected = [0.0, 1.0]
    for i in range(7):
        bounds = np.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 6) * (bounds[1:] + bounds[:-1]) / 2
        expected += [*means, *-means]
    # The fp32 linspace leaves an error of a few units in the last place of 1.
    assert np.abs(values - np.sort(expected)).max() <= 4 * 2.0**-24


@pytest.mark.parametrize("blocks", [1, 2, 255, 256, 257, 511, 512, 1000])
def test_nested_absmax(blocks: int) -> None:
    """Codes are the nearest entries of the map; the last second-level block may be short."""
    absmax = torch.rand(blocks) * 3
    nested = nest_absmax(absmax)
    offset = np.float32(nested.offset)
    assert abs(offset - absmax.double().mean().item()) <= 1e-6 * abs(offset)
    centred = absmax.numpy() - offset
    second = np.array([np.abs(centred[i : i + 256]).max() for i in range(0, blocks, 256)])
    assert np.array_equal(nested.absmax.numpy(), second)
    table = nested.map.double().numpy()
    assert np.array_equal(np.float32(dynamic_map()), nested.map.numpy())
    spread = np.where(second > 0, second, 1)[np.arange(blocks) // 256]
    normalised = (centred / spread).astype(np.float64)
    codes = nested.codes.numpy()
    distance = np.abs(normalised[:, None] - table[None, :])
    # A boundary is an fp32 number: half a unit in its last place may go to the other side.
    assert bool((distance[np.arange(blocks), codes] <= distance.min(axis=1) + 2.0**-24).all())
    expected = table[codes] * second[np.arange(blocks) // 256].astype(np.float64) + float(offset)
    got = unnest_absmax(nested.codes, nested.map, nested.absmax, nested.offset)
    assert np.abs(got.double().numpy() - expected).max() <= 2.0**-23 * np.abs(expected).max()


def test_nested_absmax_of_equal_blocks_is_exact() -> None:
    nested = nest_absmax(torch.full((300,), 0.25))
    assert torch.equal(unnest_absmax(nested.codes, nested.map, nested.absmax, nested.offset), torch.full((300,), 0.25))


NESTED = [v for v in VARIANTS if v.scale_type is ScaleType.NESTED]


@pytest.mark.parametrize("variant", NESTED, ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), [(70, 256, 32), (33, 100, 64), (70, 37, 32), (5, 4095, 64)])
def test_nested_scales_of_a_weight(variant: Variant, n: int, k: int, group_size: int) -> None:
    """Blocks over row ends (K % blocksize != 0) and a short last block of 256, in Python and in the kernel."""
    weight = make_weight(variant, n, k, group_size)
    blocks = -(-n * k // group_size) if variant.format.flat_blocks else n * -(-k // group_size)
    assert weight.scales.numel() == blocks
    assert weight.nested_absmax is not None
    assert weight.nested_absmax.shape == (-(-blocks // 256),)
    expected = exact_scales(weight)
    got = weight.decode_scales().double().numpy().reshape(-1)
    assert np.abs(got - expected).max() <= 2.0**-22 * np.abs(expected).max()
    assert torch.equal(weight.pack().dequantize(), weight.dequantize())


def test_nested_keeps_the_codes_and_nearly_the_absmax() -> None:
    """As in bitsandbytes: codes are chosen before absmax is nested. The map's steps bound the loss."""
    w = torch.randn(64, 96)
    plain, nested = quantize(w, "nf4"), quantize(w, "nf4", nested=True)
    assert torch.equal(plain.codes, nested.codes)
    assert nested.nested_absmax is not None
    steps = np.diff(np.array(dynamic_map())).max() / 2
    bound = (1 + 1e-5) * steps * nested.nested_absmax.max()
    assert (plain.decode_scales() - nested.decode_scales()).abs().max() <= bound
