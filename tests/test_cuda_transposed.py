"""``x @ W`` on a GPU: the fused kernels on every 4-bit variant, tails, strides, graphs, determinism; and what the
dispatch chooses for the rest. References are computed on the GPU in float64.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch
from conftest import (
    DTYPES,
    VARIANTS,
    CxGemmArgs,
    Variant,
    assert_within_budget,
    c_library,
    exact_weight,
    gemm,
    make_weight,
    random_weight,
)
from test_cuda_gemm import EVERY, POISON, REPLAYS, Guarded, c_arguments, capture, on_gpu, poison, random_x

from pyquant import PackedWeight, _library, explain, linear, quantize
from pyquant.formats import ScaleType, ZeroType

FUSED = {row["name"]: i for i, row in enumerate(_library.instances()) if row["is_transposed"]}
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not FUSED, reason="the libraries were built without CUDA")]

HALF_DTYPES = (torch.float16, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", HALF_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Beside the edges of every tile: 8, 16, 32 and 64 tokens; then several launches.
TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 150)
FOUR_BITS = [v for v in VARIANTS if v.format.bits == 4]
each_variant = pytest.mark.parametrize("v", FOUR_BITS[::EVERY], ids=str)
PDL, TRANSPOSED = 1, 4  # CX_GEMM_PROGRAMMATIC_LAUNCH, CX_GEMM_TRANSPOSED


def variant(name: str, scale: ScaleType | None = None, zero: ZeroType | None = None) -> Variant:
    return next(
        v for v in FOUR_BITS if v.format.name == name and scale in (None, v.scale_type) and zero in (None, v.zero_type)
    )


def arguments(
    packed: PackedWeight, x: torch.Tensor, y: torch.Tensor, index: int, bias: torch.Tensor | None = None, flags: int = 0
) -> tuple[CxGemmArgs, object]:
    args, kept = c_arguments(packed, x, y, "dispatch", bias, flags | TRANSPOSED)
    args.instance = index
    return args, kept


def call_c(*args: Any, **more: Any) -> None:
    struct, _kept = arguments(*args, **more)
    library = c_library()
    assert library.cx_gemm(ctypes.byref(struct)) == 0, library.cx_last_error()


def covers(index: int, packed: PackedWeight, x: torch.Tensor) -> bool:
    args, _kept = arguments(packed, x, x, index)
    args.ldy = packed.k
    chosen = ctypes.c_int32()
    library = c_library()
    if library.cx_select_instance(ctypes.byref(args), ctypes.byref(chosen)) == 0:
        return True
    assert b"does not cover" in library.cx_last_error()
    return False


def fused(packed: PackedWeight, x: torch.Tensor) -> int:
    """The one instance that covers the problem."""
    found = [index for index in FUSED.values() if covers(index, packed, x)]
    assert len(found) == 1, found
    return found[0]


def run(packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None, **flags: bool) -> torch.Tensor:
    """By the fused kernel, into memory that holds NaN."""
    index = fused(packed, x.reshape(-1, packed.n))
    poison((*x.shape[:-1], packed.k), x.dtype)
    return gemm(x, packed, bias, index, transposed=True, **flags)


def check(
    packed: PackedWeight, w_exact: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    y = run(packed, x, bias)
    assert_within_budget(y, x, w_exact.T, bias)
    return y


# ---- numerics


@each_dtype
@pytest.mark.parametrize("m", TOKENS)
def test_tails(m: int, dtype: torch.dtype) -> None:
    for i, (name, n, k) in enumerate(
        [
            ("int4", 320, 448),
            ("nf4", 129, 1024),
            ("uint4", 70, 130),
            ("nf4", 40, 64),
            ("int4", 1030, 65),
            ("int4", 1, 1),
        ]
    ):
        packed, w_exact = on_gpu(make_weight(variant(name), n, k))
        bias = torch.randn(k).to(dtype).cuda() if (m + i) % 2 else None
        check(packed, w_exact, random_x(m, n, dtype), bias)


@each_variant
@each_dtype
def test_every_variant_and_group_size(v: Variant, dtype: torch.dtype) -> None:
    for (n, k), m in [((200, 640), 5), ((65, 328), 40), ((333, 130), 12), ((136, 256), 64)]:
        for group_size in v.group_sizes(k):
            packed, w_exact = on_gpu(make_weight(v, n, k, group_size))
            x = random_x(m, n, dtype)
            if v.format.flat_blocks and k % group_size != 0:
                assert not any(covers(index, packed, x) for index in FUSED.values())
                continue
            check(packed, w_exact, x, torch.randn(k).to(dtype).cuda())


@each_variant
@each_dtype
def test_identity_gives_rows_of_the_weight(v: Variant, dtype: torch.dtype) -> None:
    """Every code and scale by itself: a weight has three roundings at most, of the value, the scale and the product."""
    k = 64 if v.format.flat_blocks else 130
    weight = random_weight(v, 128, k)
    packed, expected = weight.pack().to("cuda"), weight.dequantize().cuda()
    x = torch.eye(128, dtype=dtype, device="cuda")
    unit = torch.finfo(dtype).eps
    for rows in (slice(0, 8), slice(8, 24), slice(24, 56), slice(56, 120), slice(64, 128)):
        y, rows_of_w = run(packed, x[rows]).float(), expected[rows]
        bound = 3 * unit * rows_of_w.abs() + unit * unit * expected.abs().amax()
        assert bool(((y - rows_of_w).abs() <= bound).all()), rows


@each_dtype
@pytest.mark.parametrize(("n", "k"), [(4096, 1024), (1024, 4096), (512, 8192), (8192, 192), (6144, 64)])
def test_shapes_of_models(n: int, k: int, dtype: torch.dtype) -> None:
    """Clusters of every size, several passes of columns."""
    nested = variant("nf4", ScaleType.NESTED)
    for v in (variant("int4"), nested):
        packed, w_exact = on_gpu(random_weight(v, n, k))
        for m in (1, 8, 16, 30, 64, 100):
            check(packed, w_exact, random_x(m, n, dtype))


@each_dtype
def test_large_extents(dtype: torch.dtype) -> None:
    """More columns than a grid has along y, and a weight that is all columns or all slabs."""
    for n, k, m in [(16, 64 * 66000, 1), (60000, 64, 3)]:
        packed, w_exact = on_gpu(make_weight(variant("int4"), n, k))
        check(packed, w_exact, random_x(m, n, dtype))
        del packed, w_exact


@each_dtype
def test_tokens_do_not_change_each_other(dtype: torch.dtype) -> None:
    """NaN and Inf stay in their row, and a row's bits do not depend on the others' values."""
    for name, m, n, k in [("int4", 5, 70, 130), ("nf4", 60, 640, 320)]:
        packed, _ = on_gpu(make_weight(variant(name), n, k))
        x = random_x(m, n, dtype)
        clean = run(packed, x)
        for bad, (row, column) in itertools.product((torch.nan, torch.inf), [(0, 0), (m - 1, n - 1), (m // 2, n // 2)]):
            dirty = x.clone()
            dirty[row, column] = bad
            y = run(packed, dirty)
            others = torch.arange(m, device="cuda") != row
            assert torch.equal(y[others], clean[others])
            assert not bool(torch.isfinite(y[row]).all())


# ---- strides, memory


@each_dtype
def test_any_x(dtype: torch.dtype) -> None:
    """Strided, expanded, flipped and offset views equal their contiguous copies, bit for bit."""
    n, k = 72, 100
    packed, w_exact = on_gpu(make_weight(variant("int4"), n, k))
    bias = torch.randn(k).to(dtype).cuda()
    base = random_x(12, 3 * n + 7, dtype)
    flat = random_x(1, 20 * n, dtype).view(-1)
    views = {
        "row stride above N": base[:, :n],
        "storage offset": base[3:, 5 : 5 + n],
        "stride 2 along n": base[:, : 2 * n : 2],
        "transposed": random_x(n, 9, dtype).T,
        "one row, many times": base[:1, :n].expand(17, n),
        "flipped n": base[:, :n].flip(1),
        "no rows": base[:0, :n],
        "3-D": base[:, : 3 * n].reshape(4, 3, 3, n)[:, 1],
        "1-D": base[2, :n],
        "overlapping rows": flat.unfold(0, n, 7)[:9],
    }
    views |= {f"contiguous at element {i}": flat[i : i + 8 * n].view(8, n) for i in range(1, 9)}
    for what, x in views.items():
        y = gemm(x, packed, bias, fused(packed, base[:, :n]), transposed=True)
        assert y.shape == (*x.shape[:-1], k), what
        if x.numel() > 0:
            assert torch.equal(y, run(packed, x.contiguous().clone(), bias)), what
        assert_within_budget(y, x, w_exact.T, bias)


@each_variant
@each_dtype
def test_nothing_is_read_or_written_beside(v: Variant, dtype: torch.dtype) -> None:
    """Weight, x and bias lie between NaNs and stay as they are; rows of y stay apart (ldy > K), with poison between."""
    for m, n, k in [(1, 1, 1), (3, 63, 65), (8, 100, 130), (17, 64, 64), (4, 520, 33)]:
        guarded = Guarded()
        weight = make_weight(v, n, k)
        w_exact = exact_weight(weight).cuda()
        packed = weight.pack().map_tensors(guarded)
        x, bias = guarded(random_x(m, n, dtype)), guarded(torch.randn(k).to(dtype))
        before = [buffer.clone() for buffer, _ in guarded.buffers]
        for index, ldy in itertools.product(FUSED.values(), (k, k + 5, k + 64)):
            if not covers(index, packed, x):
                continue
            buffer = torch.full((256 + m * ldy * 2 + 256,), POISON, dtype=torch.uint8, device="cuda")
            y = buffer[256 : 256 + m * ldy * 2].view(dtype).view(m, ldy)
            call_c(packed, x, y, index, bias)
            assert_within_budget(y[:, :k].contiguous(), x, w_exact.T, bias)
            y[:, :k] = torch.full((2,), POISON, dtype=torch.uint8, device="cuda").view(dtype)
            assert bool((buffer == POISON).all()), (m, n, k, ldy)
        guarded.check()
        assert all(torch.equal(a, b) for (a, _), b in zip(guarded.buffers, before, strict=True))


# ---- the same bits, graphs, dependent launch


@each_dtype
def test_the_same_call_gives_the_same_bits(dtype: torch.dtype) -> None:
    for name, m in itertools.product(("int4", "nf4"), (1, 9, 64)):
        packed, _ = on_gpu(random_weight(variant(name), 4096, 1024))
        x = random_x(m, 4096, dtype)
        y = run(packed, x)
        for _ in range(50):
            assert torch.equal(run(packed, x), y)


@each_dtype
@pytest.mark.parametrize("m", [1, 12, 40])
def test_programmatic_launch_waits_for_x(dtype: torch.dtype, m: int) -> None:
    """x of each kernel is y of the one before: a kernel that reads x too early reads the last replay's."""
    packed, _ = on_gpu(random_weight(variant("int4"), 2048, 2048))
    x = random_x(m, 2048, dtype)

    def chain(pdl: bool) -> torch.Tensor:
        values = [x]
        for _ in range(8):
            values.append(run(packed, values[-1], pdl=pdl) * 0.02)
            values.append(run(packed, run(packed, values[-1], pdl=pdl), pdl=pdl) * 1e-3)
        return torch.stack(values)

    graph, y = capture(lambda: chain(True))
    for _ in range(REPLAYS):
        x.copy_(random_x(m, 2048, dtype))
        expected = chain(False)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


@each_dtype
def test_programmatic_launch_waits_before_it_writes_y(dtype: torch.dtype) -> None:
    """The kernel before still reads the memory that y goes to: another product whose x it is, and a reduction."""
    m = 8
    reader, _ = on_gpu(random_weight(variant("int4"), 2048, 4096))
    writer, _ = on_gpu(random_weight(variant("int4"), 64, 2048, seed=1))  # is done at once, if nothing holds it
    x, source = random_x(m, 64, dtype), random_x(m, 2048, dtype)
    memory = torch.empty_like(source)
    read, reduced = torch.empty(m, 4096, dtype=dtype, device="cuda"), torch.empty(m, dtype=dtype, device="cuda")
    index = fused(reader, source)

    def step() -> torch.Tensor:
        torch.add(source, 0, out=memory)
        call_c(reader, memory, read, index, flags=PDL)
        call_c(writer, x, memory, index, flags=PDL)
        torch.add(source, 0, out=memory)
        torch.sum(memory, dim=1, out=reduced)
        call_c(writer, x, memory, index, flags=PDL)
        return memory

    graph, _ = capture(step)
    expected_read, expected_y = torch.empty_like(read), torch.empty_like(memory)
    call_c(reader, source, expected_read, index)
    call_c(writer, x, expected_y, index)
    for _ in range(REPLAYS):
        for t in (memory, read, reduced):
            t.fill_(torch.nan)
        graph.replay()
        assert torch.equal(read, expected_read)
        assert torch.equal(reduced, source.sum(dim=1))
        assert torch.equal(memory, expected_y)


# ---- dispatch, gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("name", "k", "fused_tokens"),
    [("nf4", 128, 32), ("int4", 192, 32), ("nf4", 132, 0), ("kbit3", 128, 0), ("int8", 70, 0)],
)
def test_dispatch(name: str, k: int, fused_tokens: int, dtype: torch.dtype) -> None:
    """Fused up to so many tokens; else torch's own GEMM on the weight in x's dtype, and explain says so."""
    v = next(v for v in VARIANTS if v.format.name == name)
    packed, w_exact = on_gpu(make_weight(v, 90, k))
    bias = torch.randn(k).to(dtype).cuda()
    for m in (1, 32, 33, 300):
        x = random_x(m, 90, dtype)
        explanation = explain(x, packed, transposed=True)
        expect_fused = m <= fused_tokens and dtype is not torch.float32
        assert explanation.instance.startswith("cuda_transposed_" if expect_fused else "cuda_dequant"), explanation
        assert explanation.dense == (not expect_fused)
        assert explanation.chosen_by == "rule"
        poison((m, k), dtype)
        y = linear(x, packed, bias, transposed=True)
        assert_within_budget(y, x, w_exact.T, bias, dense=explanation.dense)


@pytest.mark.parametrize(
    ("name", "n", "last"),
    [("int4", 4096, 64), ("int4", 8192, 96), ("int4", 16384, 128), ("nf4", 4096, 64), ("nf4", 16384, 96)],
)
def test_dispatch_of_large_weights(name: str, n: int, last: int) -> None:
    """The larger the weight, the more tokens it takes until dequantizing it pays."""
    packed = quantize(torch.randn(n, 4096, device="cuda"), name).pack()
    for m, dense in [(last, False), (last + 1, True)]:
        assert explain(random_x(m, n, torch.bfloat16), packed, transposed=True).dense == dense


@each_dtype
def test_gradients(dtype: torch.dtype) -> None:
    """Of the product and of the transposed product: each other's."""
    packed, w_exact = on_gpu(make_weight(variant("nf4"), 192, 320))
    for transposed, w in [(False, w_exact), (True, w_exact.T)]:
        for m in (3, 100):
            x = random_x(m, w.shape[1], dtype).requires_grad_()
            bias = torch.randn(w.shape[0], device="cuda").to(dtype).requires_grad_()
            upstream = random_x(m, w.shape[0], dtype)
            linear(x, packed, bias, transposed=transposed).backward(upstream)
            assert x.grad is not None
            assert bias.grad is not None
            assert_within_budget(x.grad, upstream, w.T, dense=True)
            assert torch.equal(bias.grad, upstream.sum(0))


@each_dtype
@pytest.mark.parametrize("m", [1, 16, 32])
def test_a_call_allocates_its_output_only(dtype: torch.dtype, m: int) -> None:
    packed, _ = on_gpu(random_weight(variant("int4"), 1024, 4096))
    x = random_x(m, 1024, dtype)
    linear(x, packed, transposed=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    linear(x, packed, transposed=True)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] - before == 1


def test_autocast_leaves_the_dense_way_alone() -> None:
    """torch's own GEMM inside the operator runs in x's dtype under autocast too, both ways round."""
    packed, w_exact = on_gpu(make_weight(variant("nf4"), 192, 320))
    for transposed, w in [(False, w_exact), (True, w_exact.T)]:
        x = random_x(100, w.shape[1], torch.float32)
        assert explain(x, packed, transposed=transposed).dense
        expected = linear(x, packed, transposed=transposed)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = linear(x, packed, transposed=transposed)
        assert y.dtype == torch.float32
        assert torch.equal(y, expected)


def test_errors() -> None:
    packed, _ = on_gpu(make_weight(variant("int4"), 33, 70))
    x = random_x(2, 33, torch.float16)
    good = linear(x, packed, transposed=True)
    for call, message in [
        (lambda: linear(x[:, :32], packed, transposed=True), r"^gemm: x has N=32, the weight has N=33"),
        (lambda: linear(x.cpu(), packed, transposed=True), r"^gemm: codes: expected a contiguous CPU tensor of Byte"),
        (
            lambda: linear(x, packed, torch.zeros(33, device="cuda").half(), transposed=True),
            r"^gemm: bias: expected shape \[K=70\], got 33 values",
        ),
        (lambda: gemm(x, packed, None, next(iter(FUSED.values()))), r"^gemm: x has K=33, the weight has K=70"),
        (
            lambda: gemm(random_x(2, 70, torch.float16), packed, None, FUSED["cuda_transposed_int4_fp16"]),
            r"^gemm: instance: cuda_transposed_int4_fp16 does not cover",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
        assert torch.equal(linear(x, packed, transposed=True), good)
