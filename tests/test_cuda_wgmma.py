"""The wgmma kernels on a GPU: tails of every tile, groups, scale kinds, zeros, strides, graphs, determinism.

`test_cuda_gemm.py` runs every instance on few tokens; here are the token counts that wgmma is for.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import VARIANTS, Variant, assert_within_budget, make_weight, random_weight
from test_cuda_gemm import EVERY, GEMMS, REPLAYS, c_arguments, call_c, capture, covers, on_gpu, random_x, run

from pyquant import PackedWeight, explain
from pyquant.formats import ScaleType, ZeroType

WGMMA = {name: index for name, index in GEMMS.items() if name.startswith("cuda_wgmma_")}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not WGMMA, reason="the libraries were built without CUDA")]

HALF_DTYPES = (torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Beside the edges of every tile: 32, 64, 128 and 256 tokens.
TOKENS = (1, 17, 31, 33, 63, 65, 127, 129, 255, 257, 1000)
FOUR_BITS = [v for v in VARIANTS if v.format.bits == 4]


def variant(name: str, scale: ScaleType | None = None, zero: ZeroType | None = None) -> Variant:
    return next(
        v for v in VARIANTS if v.format.name == name and scale in (None, v.scale_type) and zero in (None, v.zero_type)
    )


def instance(packed: PackedWeight, x: torch.Tensor) -> str:
    """The one instance that covers the problem."""
    names = [name for name in WGMMA if covers(name, packed, x)]
    assert len(names) == 1, names
    return names[0]


def check(
    packed: PackedWeight, w_exact: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = run(instance(packed, x), packed, x, bias)
    assert_within_budget(y, x, w_exact, bias)
    return y


@each_dtype
@pytest.mark.parametrize("m", TOKENS)
def test_tails_of_tokens(m: int, dtype: torch.dtype) -> None:
    for name, n, k in [("int4", 320, 448), ("nf4", 129, 1024), ("uint4", 70, 130), ("nf4", 1, 64), ("int4", 1030, 65)]:
        packed, w_exact = on_gpu(make_weight(variant(name), n, k))
        x = random_x(m, -(-k // 8) * 8, dtype)[:, :k]  # TMA wants rows on 16 bytes
        bias = torch.randn(n).to(dtype).cuda()
        check(packed, w_exact, x, bias)


@pytest.mark.parametrize("v", FOUR_BITS[::EVERY], ids=str)
@each_dtype
def test_every_variant_and_group_size(v: Variant, dtype: torch.dtype) -> None:
    for (n, k), m in [((200, 640), 70), ((65, 328), 300)]:
        for group_size in v.group_sizes(k):
            weight = make_weight(v, n, k, group_size)
            packed, w_exact = on_gpu(weight)
            x = random_x(m, k, dtype)
            if v.format.flat_blocks and k % group_size != 0:
                assert not any(covers(name, packed, x) for name in WGMMA)
                continue
            check(packed, w_exact, x)


@pytest.mark.parametrize("v", FOUR_BITS[::EVERY], ids=str)
@each_dtype
def test_identity(v: Variant, dtype: torch.dtype) -> None:
    """Every code and scale by itself: a weight has three roundings at most, of the value, the scale and the product."""
    k = 64 if v.format.flat_blocks else 128
    weight = random_weight(v, 128, k)
    packed, expected = weight.pack().to("cuda"), weight.dequantize().cuda().T
    x = torch.eye(k, dtype=dtype, device="cuda")
    y = run(instance(packed, x), packed, x).float()
    largest = expected.abs().amax()
    unit = torch.finfo(dtype).eps
    assert bool(((y - expected).abs() <= 3 * unit * expected.abs() + unit * unit * largest).all())


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (1024, 8192), (6144, 512)])
def test_shapes_of_models(n: int, k: int, dtype: torch.dtype) -> None:
    """Clusters, parts of K, several tiles of a thread block."""
    for name in ("int4", "nf4"):
        packed, w_exact = on_gpu(random_weight(variant(name), n, k))
        for m in (20, 64, 128, 300) if EVERY > 1 else (20, 48, 64, 100, 128, 200, 256, 600, 2000):
            check(packed, w_exact, random_x(m, k, dtype))


@each_dtype
def test_rows_of_x_and_y_with_strides(dtype: torch.dtype) -> None:
    packed, w_exact = on_gpu(make_weight(variant("int4"), 200, 320))
    base = random_x(300, 1024, dtype)
    for x in (base[:, :320], base[:, 64:384], base[::3, 8:328], base[5:6, :320], base[:100, 320:640]):
        check(packed, w_exact, x)
    x = base[:, :320]
    for n_stride in (200, 203, 208):
        memory = torch.full((300, n_stride), torch.nan, dtype=dtype, device="cuda")
        call_c(packed, x, memory, instance(packed, x))
        assert_within_budget(memory[:, :200].contiguous(), x, w_exact)
        assert bool(memory[:, 200:].isnan().all())


@each_dtype
def test_x_that_tma_refuses(dtype: torch.dtype) -> None:
    """Rows that do not start on 16 bytes: another family computes it."""
    packed, w_exact = on_gpu(make_weight(variant("nf4"), 200, 320))
    base = random_x(70, 1024, dtype)
    odd = random_x(1, 70 * 321 + 8, dtype).view(-1)
    for x in (base[:, 1:321], base[:, 4:324], odd[: 70 * 321].view(70, 321)[:, :320], base[:1, :320].expand(70, 320)):
        if x.stride(0) != 0:
            assert not any(covers(name, packed, x) for name in WGMMA)
        assert_within_budget(run("dispatch", packed, x), x, w_exact, dense=True)


@each_dtype
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    for name, m in itertools.product(("int4", "nf4"), (33, 128, 500)):
        packed, w_exact = on_gpu(random_weight(variant(name), 2048, 4096))
        x = random_x(m, 4096, dtype)
        y = check(packed, w_exact, x)
        for _ in range(10):
            assert torch.equal(run(instance(packed, x), packed, x), y)


@each_dtype
def test_tokens_do_not_change_each_other(dtype: torch.dtype) -> None:
    """NaN stays in its row, and a row's bits do not depend on the others' values."""
    packed, _ = on_gpu(make_weight(variant("int4"), 300, 640))
    x = random_x(150, 640, dtype)
    clean = run(instance(packed, x), packed, x)
    dirty = x.clone()
    dirty[77, 639] = torch.nan
    y = run(instance(packed, x), packed, dirty)
    others = torch.arange(150, device="cuda") != 77
    assert torch.equal(y[others], clean[others])
    assert bool(y[77].isnan().all())


@each_dtype
def test_graph_and_dependent_launch(dtype: torch.dtype) -> None:
    packed, _ = on_gpu(random_weight(variant("int4"), 1024, 1024))
    x = random_x(100, 1024, dtype)
    name = instance(packed, x)

    def step() -> torch.Tensor:
        y = x
        for _ in range(4):
            out = torch.empty_like(y)
            call_c(packed, y, out, name, flags=1)
            y = out * 0.01
        return y

    expected = step()
    assert bool(torch.isfinite(expected).all())
    graph, y = capture(step)
    for _ in range(REPLAYS):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


def test_two_streams_at_once() -> None:
    dtype = torch.bfloat16
    cases = []
    for seed, (n, k, m) in enumerate([(2048, 2048, 64), (1024, 4096, 200)]):
        packed, w_exact = on_gpu(random_weight(variant("int4"), n, k, seed=seed))
        x = random_x(m, k, dtype)
        cases.append((packed, x, check(packed, w_exact, x), torch.cuda.Stream()))
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for i, (packed, x, _, stream) in enumerate(cases):
            with torch.cuda.stream(stream):
                results[i].append(run(instance(packed, x), packed, x))
    torch.cuda.synchronize()
    for (_, _, expected, _), ys in zip(cases, results, strict=True):
        assert all(torch.equal(y, expected) for y in ys)


def test_dispatch_names_it() -> None:
    packed, w_exact = on_gpu(random_weight(variant("int4"), 1024, 1024))
    for dtype, m in itertools.product(HALF_DTYPES, (33, 128, 1024)):
        x = random_x(m, 1024, dtype)
        args, _kept = c_arguments(packed, x, x, "dispatch")
        assert args.instance == -1
        assert explain(x, packed, None).instance in WGMMA
        assert_within_budget(run("dispatch", packed, x), x, w_exact)
