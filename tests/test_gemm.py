"""The GEMM: every kernel instance, every combination of the format table, any x, nothing written beyond y."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DTYPES,
    VARIANTS,
    CxGemmArgs,
    Variant,
    assert_within_budget,
    c_library,
    c_weight,
    each_dtype,
    each_variant,
    exact_weight,
    gemm,
    gemm_instances,
    make_weight,
    random_weight,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pyquant import PackedWeight, _library, linear

INSTANCES = gemm_instances()
each_instance = pytest.mark.parametrize("instance", INSTANCES, ids=INSTANCES.values())

TOKENS = (0, 1, 2, 3, 8, 9, 17, 64, 70)
EXTENTS = (1, 3, 63, 64, 65, 100, 130, 384)
SHAPES = list(itertools.product(TOKENS, EXTENTS, EXTENTS))
CASES = list(itertools.product(VARIANTS, DTYPES))
SHAPES_PER_CASE = 10


def shapes_of_case(case: int) -> list[tuple[int, int, int]]:
    """A share of all shapes, another one for each case; a step prime to their number mixes them."""
    return [SHAPES[(case * SHAPES_PER_CASE + i) * 157 % len(SHAPES)] for i in range(SHAPES_PER_CASE)]


def one_packed(n: int, k: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    """A weight of the first combination and its exact values."""
    weight = make_weight(VARIANTS[0], n, k, seed=seed)
    return weight.pack(), exact_weight(weight)


def manifest() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "kernels" / "instances.py"
    spec = importlib.util.spec_from_file_location("kernel_instances", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_gemm_instance_is_forced() -> None:
    """The instances of these tests are the CPU's of the manifest that are GEMMs and that this machine can run."""
    available = {row["name"] for row in _library.instances() if row["available"]}
    declared = {i.name for i in manifest().CPU_INSTANCES if i.family != "dequant"}
    assert set(INSTANCES.values()) == declared & available
    assert {name for name in declared if name.endswith("_portable")} <= set(INSTANCES.values())
    assert len(INSTANCES) > 0


def test_every_shape_is_tested() -> None:
    tested = [shape for case in range(len(CASES)) for shape in shapes_of_case(case)]
    assert set(tested) == set(SHAPES)
    assert len(SHAPES) == len(TOKENS) * len(EXTENTS) ** 2


# ---- numerics


@each_variant
@each_dtype
def test_identity_gives_back_the_weight(variant: Variant, dtype: torch.dtype) -> None:
    """x = I, every instance: fp32 exactly the dequantized weight, fp16 and bf16 that weight rounded once.

    Random codes of 33 x 130 hold every code of every format; M = 130 goes through all tails of the token loops.
    """
    exercised = 0
    for k, group_size in [(130, None), (64, variant.group_sizes(64)[0]), (70, variant.group_sizes(70)[-1])]:
        weight = random_weight(variant, 33, k, group_size)
        packed, expected = weight.pack(), weight.dequantize().to(dtype).T
        assert torch.equal(packed.dequantize(dtype), expected.T)
        for instance, name in INSTANCES.items():
            y = gemm(torch.eye(k, dtype=dtype), packed, instance=instance)
            assert torch.equal(y, expected), (name, k)
            exercised += 1
    assert exercised == 3 * len(INSTANCES) > 0


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{v}-{str(d)[6:]}" for v, d in CASES])
def test_budget_over_odd_shapes(case: int) -> None:
    """Every instance and the dispatch, with and without bias, groups of all sizes."""
    variant, dtype = CASES[case]
    for i, (m, n, k) in enumerate(shapes_of_case(case)):
        sizes = variant.group_sizes(k)
        weight = make_weight(variant, n, k, sizes[(case + i) % len(sizes)], seed=i)
        packed, w_exact = weight.pack(), exact_weight(weight)
        x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n).to(dtype) if i % 2 else None
        for instance in (-1, *INSTANCES):
            assert_within_budget(gemm(x, packed, bias, instance), x, w_exact, bias)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Variant, torch.dtype, tuple[int, int, int], int, bool, int]:
    variant = draw(st.sampled_from(VARIANTS))
    shape = draw(st.integers(0, 80)), draw(st.integers(1, 200)), draw(st.integers(1, 400))
    group_size = draw(st.sampled_from(variant.group_sizes(shape[2])))
    return variant, draw(st.sampled_from(DTYPES)), shape, group_size, draw(st.booleans()), draw(st.integers(0, 99))


@settings(max_examples=300)
@given(problems())
def test_budget_over_random_shapes(problem: tuple) -> None:
    variant, dtype, (m, n, k), group_size, has_bias, seed = problem
    weight = random_weight(variant, n, k, group_size, seed)
    packed, w_exact = weight.pack(), exact_weight(weight)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(n).to(dtype) if has_bias else None
    for instance in (-1, *INSTANCES):
        assert_within_budget(gemm(x, packed, bias, instance), x, w_exact, bias)


@each_instance
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 20000), (600, 40, 300), (40, 40, 70000)])
def test_budget_of_long_sums_and_many_tokens(instance: int, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    """K and M beyond one pass of every kernel: more blocks than a run, more tokens than a tile."""
    packed, w_exact = one_packed(n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    assert_within_budget(gemm(x, packed, bias, instance), x, w_exact, bias)


@each_instance
def test_large_and_small_activations(instance: int) -> None:
    """The error is relative: magnitudes of x do not matter, subnormal fp16 included."""
    packed, w_exact = one_packed(65, 130)
    for scale in (1e-20, 1e-4, 1e4, 1e20):
        x = torch.randn(9, 130) * scale
        assert_within_budget(gemm(x, packed, instance=instance) / scale, x / scale, w_exact)
    half = (torch.randn(9, 130) * 1e-5).half()
    expected = gemm(half.float(), packed, instance=instance).half()
    assert torch.equal(gemm(half, packed, instance=instance), expected)


# ---- shapes and strides of x


@each_instance
@each_dtype
def test_any_x(instance: int, dtype: torch.dtype) -> None:
    """Strided, transposed, expanded, flipped and offset views equal their contiguous copies, bit for bit."""
    k = 100
    packed, w_exact = one_packed(70, k)
    bias = torch.randn(70).to(dtype)
    base = torch.randn(12, 3 * k + 7).to(dtype)
    views = {
        "row stride above K": base[:, :k],
        "storage offset": base[3:, 5 : 5 + k],
        "every second row": base[::2, :k],
        "stride 2 along k": base[:, : 2 * k : 2],
        "transposed": torch.randn(k, 9).to(dtype).T,
        "one row, many times": base[:1, :k].expand(17, k),
        "one value, many times": base[:1, :1].expand(5, k),
        "flipped rows": base[:, :k].flip(0),
        "flipped k": base[:, :k].flip(1),
        "one row of a matrix": base[4:5, 1 : 1 + k],
        "no rows": base[:0, :k],
        "3-D": base[:, : 3 * k].reshape(4, 3, 3, k)[:, 1],
        "3-D permuted": torch.randn(3, k, 2).to(dtype).permute(2, 0, 1),
        "3-D expanded": base[:3, :k].expand(2, 3, k),
        "4-D": torch.randn(2, 1, 3, k).to(dtype),
        "1-D": base[2, :k],
        "1-D, stride 2": base[2, : 2 * k : 2],
        "no tokens, 3-D": torch.empty(2, 0, k, dtype=dtype),
    }
    for name, x in views.items():
        y = gemm(x, packed, bias, instance)
        assert y.shape == (*x.shape[:-1], 70), name
        assert y.is_contiguous(), name
        assert torch.equal(y, gemm(x.contiguous().clone(), packed, bias, instance)), name
        assert_within_budget(y, x, w_exact, bias)


def test_overlapping_rows_of_x() -> None:
    """Rows closer than K, as a sliding window makes them."""
    k = 100
    packed, w_exact = one_packed(70, k)
    base = torch.randn(200)
    views = [base.unfold(0, k, 1), base.unfold(0, k, 7), base.as_strided((30, k), (3, 1))]
    views += [base.unfold(0, k, 1)[None], base.unfold(0, k, 50).unsqueeze(1)]
    for instance in INSTANCES:
        for x in views:
            y = gemm(x, packed, instance=instance)
            assert torch.equal(y, gemm(x.contiguous(), packed, instance=instance))
            assert_within_budget(y, x, w_exact)


@each_instance
@each_variant
def test_n_and_k_of_one(instance: int, variant: Variant) -> None:
    """A [M, 1] view may have any strides and still count as contiguous."""
    weight = random_weight(variant, 1, 1)
    packed, w_exact = weight.pack(), exact_weight(weight)
    for x in (torch.randn(4, 1), torch.randn(4, 7)[:, :1], torch.randn(1, 4).T, torch.randn(1).expand(4, 1)):
        assert_within_budget(gemm(x, packed, instance=instance), x, w_exact)


@each_variant
def test_linear_is_f_linear(variant: Variant) -> None:
    """The public call, by the dispatch: shapes and values of F.linear on the dequantized weight."""
    weight = make_weight(variant, 65, 130)
    packed, dense = weight.pack(), weight.dequantize()
    bias = torch.randn(65)
    for shape in [(130,), (1, 130), (20, 130), (2, 3, 130), (0, 130), (2, 0, 130)]:
        x = torch.randn(shape)
        y = linear(x, packed, bias)
        assert y.shape == F.linear(x, dense, bias).shape
        assert_within_budget(y, x, exact_weight(weight), bias)


@each_instance
def test_nan_and_inf_stay_in_their_row(instance: int) -> None:
    """IEEE semantics: a row with NaN or Inf gives NaN or Inf, the other rows keep their bits; tails included."""
    for m, k in [(5, 130), (70, 64), (9, 65)]:
        packed, _ = one_packed(70, k)
        x = torch.randn(m, k)
        clean = gemm(x, packed, instance=instance)
        for bad in (float("nan"), float("inf"), -float("inf")):
            for row, column in [(0, 0), (m - 1, k - 1), (m // 2, k // 2)]:
                dirty = x.clone()
                dirty[row, column] = bad
                y = gemm(dirty, packed, instance=instance)
                others = torch.arange(m) != row
                assert torch.equal(y[others], clean[others])
                assert not bool(torch.isfinite(y[row]).all())


# ---- same bits


@each_instance
@each_dtype
def test_same_bits_every_time_and_for_any_threads(instance: int, dtype: torch.dtype, threads: Any) -> None:
    """A row's sum does not depend on the threads, which share out rows and tokens."""
    for m in (1, 9, 70):
        packed, _ = one_packed(150, 400)
        x, bias = torch.randn(m, 400).to(dtype), torch.randn(150).to(dtype)
        threads(1)
        first = gemm(x, packed, bias, instance)
        for count in (1, 2, 3, 8):
            threads(count)
            for _ in range(3):
                assert torch.equal(gemm(x, packed, bias, instance), first), count


@each_instance
def test_rows_do_not_depend_on_their_neighbours(instance: int) -> None:
    """A token's result is the same alone and in a batch, wherever it stands."""
    packed, w_exact = one_packed(70, 130)
    x = torch.randn(70, 130)
    whole = gemm(x, packed, instance=instance)
    for start, stop in [(0, 1), (69, 70), (3, 12), (5, 40)]:
        part = gemm(x[start:stop], packed, instance=instance)
        assert_within_budget(part, x[start:stop], w_exact)
        assert torch.allclose(part, whole[start:stop], rtol=1e-5, atol=1e-5)


def test_two_threads_at_once() -> None:
    """Concurrent calls on one weight and on different ones, with their own workspaces."""
    problems = []
    for i in range(4):
        packed, _ = one_packed(65 + 40 * i, 100 + 64 * i, seed=i)
        x = torch.randn((1, 9, 70, 33)[i], packed.k)
        problems.append((x, packed))

    def work(offset: int) -> list[torch.Tensor]:
        return [
            gemm(*problems[(i + offset) % len(problems)], instance=instance)
            for i in range(40)
            for instance in INSTANCES
        ]

    expected = [work(0), work(1)]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, [0, 1] * 2))
    for i, result in enumerate(results):
        assert len(result) == 40 * len(INSTANCES)
        assert all(torch.equal(a, b) for a, b in zip(result, expected[i % 2], strict=True))


def test_weight_and_x_are_only_read() -> None:
    for variant in VARIANTS:
        packed = random_weight(variant, 33, 70).pack()
        x, bias = torch.randn(9, 70), torch.randn(33)
        before = [t.clone() for t in (x, bias, *packed.tensors().values())]
        for instance in INSTANCES:
            gemm(x, packed, bias, instance)
        after = (x, bias, *packed.tensors().values())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# ---- the C API: leading dimensions, buffers, workspace

POISON = 0xA5


def call_c(
    packed: PackedWeight, x: torch.Tensor, rows: int, ldx: int, ldy: int, instance: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """cx_gemm into the middle of a poisoned buffer, with a workspace of exactly the bytes asked for.

    Returns the rows of y with their padding, after checking that nothing around them and around the workspace changed.
    """
    library = c_library()
    guard, item = 256, x.element_size()
    size = (rows - 1) * ldy * item + packed.n * item
    y = torch.full((guard + size + guard,), POISON, dtype=torch.uint8)
    struct = c_weight(packed)
    args = CxGemmArgs(
        weight=ctypes.pointer(struct),
        dtype=DTYPES.index(x.dtype),
        m=rows,
        x=x.data_ptr(),
        ldx=ldx,
        y=y.data_ptr() + guard,
        ldy=ldy,
        bias=None if bias is None else bias.data_ptr(),
        instance=instance,
        threads=2,
    )
    needed = ctypes.c_size_t()
    assert library.cx_gemm_workspace(ctypes.byref(args), ctypes.byref(needed)) == 0, library.cx_last_error()
    workspace = torch.full((needed.value + 64 + 2 * guard,), POISON, dtype=torch.uint8)
    start = guard + -(workspace.data_ptr() + guard) % 64
    args.workspace, args.workspace_bytes = workspace.data_ptr() + start, needed.value
    assert library.cx_gemm(ctypes.byref(args)) == 0, library.cx_last_error()
    untouched = (y[:guard], y[guard + size :], workspace[:start], workspace[start + needed.value :])
    assert all(bool((part == POISON).all()) for part in untouched)
    padded = torch.cat([y[guard : guard + size], y.new_full(((ldy - packed.n) * item,), POISON)])
    return padded.view(rows, ldy * item)


@each_instance
@each_dtype
def test_nothing_is_written_beyond_y(instance: int, dtype: torch.dtype) -> None:
    """Rows of y stay apart (ldy > N), and what lies between rows of x (NaN here) is not used."""
    for m, n, k in [(1, 1, 1), (3, 65, 63), (9, 130, 100), (70, 33, 130), (17, 64, 64)]:
        packed, w_exact = one_packed(n, k)
        for ldx, ldy in [(k, n), (k + 3, n + 5), (k + 64, n + 64)]:
            x = torch.full((m, ldx), torch.nan).to(dtype)
            x[:, :k] = torch.randn(m, k).to(dtype)
            bias = torch.randn(n).to(dtype) if ldx > k else None
            rows = call_c(packed, x, m, ldx, ldy, instance, bias)
            split = n * x.element_size()
            assert bool((rows[:, split:] == POISON).all())
            y = rows[:, :split].contiguous().view(dtype)
            assert_within_budget(y, x[:, :k], w_exact, bias)
            assert torch.equal(y, gemm(x[:, :k], packed, bias, instance))


@each_instance
def test_leading_dimension_zero_repeats_a_row(instance: int) -> None:
    packed, w_exact = one_packed(33, 70)
    x = torch.randn(1, 70)
    y = call_c(packed, x, 12, 0, 33, instance, None).view(torch.float32)
    assert_within_budget(y, x.expand(12, 70), w_exact)


# ---- the dispatch and its errors


def test_dispatch_takes_the_best_available_family() -> None:
    """Few tokens stream, many tile; the result is the forced instance's, bit for bit."""
    packed, _ = one_packed(65, 130)
    by_family = {}
    for index, name in INSTANCES.items():
        by_family.setdefault(name.split("_")[1], index)  # the manifest lists the best first
    assert by_family.keys() == {"stream", "tile"}
    for m, family in [(1, "stream"), (20, "stream"), (21, "tile"), (100, "tile")]:
        x = torch.randn(m, 130)
        assert torch.equal(gemm(x, packed), gemm(x, packed, instance=by_family[family])), m


def test_wrong_instances() -> None:
    packed, _ = one_packed(8, 64)
    x = torch.randn(2, 64)
    rows = _library.instances()
    # Beyond 32 bits they must not wrap round to an instance.
    for index in (-2, len(rows), 10**6, 2**31 - 1, 2**32, 2**32 - 1, -(2**32), 2**62):
        with pytest.raises(RuntimeError, match=rf"gemm: instance: expected 0\.\.{len(rows) - 1}, got {index}$"):
            gemm(x, packed, instance=index)
    others = [i for i, row in enumerate(rows) if not row["is_gemm"] or row["device"] != "cpu"]
    assert others
    for index in others:
        name = re.escape(rows[index]["name"])
        with pytest.raises(RuntimeError, match=rf"instance: expected a GEMM for the CPU, got {name}"):
            gemm(x, packed, instance=index)
    for index in (i for i, row in enumerate(rows) if not row["available"] and i not in others):
        with pytest.raises(RuntimeError, match="this machine cannot run"):
            gemm(x, packed, instance=index)


@pytest.mark.parametrize(
    ("flags", "message"), [(8, b"flags: expected CX_GEMM_ values, got 0x8"), (1 << 31, b"flags: ")]
)
def test_unknown_flags_are_refused(flags: int, message: bytes) -> None:
    packed, _ = one_packed(8, 64)
    struct, x, y = c_weight(packed), torch.randn(1, 64), torch.full((1, 8), 7.0)
    args = CxGemmArgs(
        weight=ctypes.pointer(struct), m=1, x=x.data_ptr(), ldx=64, y=y.data_ptr(), ldy=8, instance=-1, flags=flags
    )
    library = c_library()
    assert library.cx_gemm(ctypes.byref(args)) != 0
    assert message in library.cx_last_error()
    assert bool((y == 7).all())
