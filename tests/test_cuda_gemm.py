"""The GEMM on a GPU: every kernel instance that covers a problem, and the dispatch, under the contract of the CPU.

Weights are packed on the CPU and moved, so that a fault of packing on the GPU shows elsewhere. References are computed
on the GPU in float64. `PYQUANT_GPU_EVERY=n` keeps every n-th case of the long tests, and `PYQUANT_GPU_GEMMS=glob`
some instances, without the dispatch: both are for the sanitizers.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

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
    exact_weight,
    gemm,
    make_weight,
    random_weight,
)

from pyquant import PackedWeight, QuantizedWeight, _library, explain, linear, load_table, quantize
from pyquant.ops import op_arguments
from pyquant.tables import Bucket, Entry, Table

# In the manifest of a build with CUDA, whether or not this machine can run them.
ONLY = os.environ.get("PYQUANT_GPU_GEMMS", "*")
GEMMS = {
    row["name"]: i
    for i, row in enumerate(_library.instances())
    if row["device"] == "cuda" and row["is_gemm"] and not row["is_transposed"] and fnmatch(row["name"], ONLY)
}
DISPATCH = {"dispatch": -1} if ONLY == "*" else {}
each_gemm = pytest.mark.parametrize("name", [*DISPATCH, *GEMMS])

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GEMMS, reason=f"the libraries were built without CUDA ({_library.build_info()['cuda']})"),
]

EVERY = int(os.environ.get("PYQUANT_GPU_EVERY", "1"))
TOKENS = (1, 2, 7, 8, 9, 16, 17, 32, 33)
# N and K: one, odd, beside 64, with tails of a step, of a block and of a slab.
EXTENTS = ((1, 1), (1, 200), (3, 65), (33, 64), (64, 130), (65, 63), (130, 384), (257, 100), (100, 1000))
CASES = list(itertools.product(VARIANTS, DTYPES))
each_case_variant = pytest.mark.parametrize("variant", VARIANTS[::EVERY], ids=str)
NOT_COVERED = "does not cover"
POISON = 0xA5


def index_of(name: str) -> int:
    return {**DISPATCH, **GEMMS}[name]


def on_gpu(weight: QuantizedWeight) -> tuple[PackedWeight, torch.Tensor]:
    """The packed weight and its exact values, both on the GPU."""
    return weight.pack().to("cuda"), exact_weight(weight).cuda()


@functools.cache
def one_packed(n: int, k: int, seed: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    return on_gpu(make_weight(VARIANTS[0], n, k, seed=seed))


def covers(name: str, packed: PackedWeight, x: torch.Tensor) -> bool:
    """Whether the instance says that it can run the problem; asked without running it."""
    args, _kept = c_arguments(packed, x, x, name)
    args.ldy = packed.n
    chosen = ctypes.c_int32()
    library = c_library()
    if library.cx_select_instance(ctypes.byref(args), ctypes.byref(chosen)) == 0:
        return True
    message = library.cx_last_error().decode()
    assert NOT_COVERED in message, message
    return False


def c_arguments(
    packed: PackedWeight, x: torch.Tensor, y: torch.Tensor, name: str, bias: torch.Tensor | None = None, flags: int = 0
) -> tuple[CxGemmArgs, object]:
    """cx_gemm_args of 2-D x and y, with any row strides, on the current stream; and what must outlive them."""
    struct = c_weight(packed)
    args = CxGemmArgs(
        weight=ctypes.pointer(struct),
        dtype=DTYPES.index(x.dtype),
        m=x.shape[0],
        x=x.data_ptr(),
        ldx=x.stride(0),
        y=y.data_ptr(),
        ldy=y.stride(0),
        bias=None if bias is None else bias.data_ptr(),
        device=1,
        stream=torch.cuda.current_stream().cuda_stream,
        instance=index_of(name),
        flags=flags,
    )
    return args, struct


def call_c(*arguments: object, **more: object) -> None:
    args, _kept = c_arguments(*arguments, **more)  # type: ignore[arg-type]
    library = c_library()
    assert library.cx_gemm(ctypes.byref(args)) == 0, library.cx_last_error()


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Leaves NaN in the memory that the next allocation of this shape gets; returns its address."""
    block = torch.full(shape, torch.nan, dtype=dtype, device="cuda")
    return block.data_ptr()


def run(name: str, packed: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The GEMM by an instance or by the dispatch, into memory that holds NaN."""
    poison((*x.shape[:-1], packed.n), x.dtype)
    return gemm(x, packed, bias, index_of(name))


def runs(packed: PackedWeight, x: torch.Tensor) -> Iterator[str]:
    """The dispatch and every instance that covers the problem; of the latter there is one at least."""
    yield from DISPATCH
    names = [name for name in GEMMS if covers(name, packed, x)]
    assert names or not DISPATCH, "no instance covers the problem"
    yield from names


def random_x(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k).to(dtype).cuda()


# ---- numerics


def test_every_instance_is_available() -> None:
    """The build has code for this GPU, and each instance covers something of these tests."""
    rows = [row for row in _library.instances() if row["device"] == "cuda"]
    assert rows
    assert all(row["available"] for row in rows), rows
    covered = set()
    for variant, dtype in CASES:
        packed = random_weight(variant, 64, 128).pack().to("cuda")
        covered.update(runs(packed, random_x(1, 128, dtype)))
    assert covered - {"dispatch"} == GEMMS.keys()


@pytest.fixture
def rule_only(tmp_path: Path) -> Iterator[None]:
    """A table of no weight that the test has, so that the dispatch's rule decides."""
    pytest.importorskip("jsonschema")
    entry = Entry("codebook2", "fp32", 0, 1, 1, (Bucket(1, None, "cuda_simt_fp32"),))
    path = tmp_path / "table.json"
    path.write_text(Table(torch.cuda.get_device_name(), None, (entry,)).to_json())
    load_table(path)
    yield
    load_table(None)


@pytest.mark.usefixtures("rule_only")
def test_dispatch_of_a_large_weight() -> None:
    """wgmma takes over from stream at fewer tokens than for small weights, on GPUs that have it."""
    packed = quantize(torch.randn(4160, 4160, device="cuda"), "nf4").pack()
    wgmma = "wgmma" if torch.cuda.get_device_capability() == (9, 0) else "stream"
    for m, family in {16: "stream", 17: wgmma}.items():
        assert explain(random_x(m, 4160, torch.bfloat16), packed).instance.startswith(f"cuda_{family}_")


@pytest.mark.usefixtures("rule_only")
@each_dtype
@pytest.mark.parametrize(
    ("name", "k", "families"),
    [
        ("nf4", 128, {1: "stream", 24: "stream", 25: "wgmma", 1024: "wgmma", 1025: "dense"}),
        ("nf4", 132, {1: "dense", 16: "dense"}),  # flat scales
        ("kbit3", 128, {1: "simt", 8: "simt", 9: "dense"}),
        ("kbit3", 132, {1: "dense"}),
        ("int8", 128, {8: "simt", 9: "dense"}),
    ],
)
def test_dispatch_by_tokens(name: str, k: int, families: dict[int, str], dtype: torch.dtype) -> None:
    """A caller with a dense GEMM gets it where it was faster when measured, and explain says so. cx_gemm alone runs."""
    packed, w_exact = on_gpu(quantize(torch.randn(70, k), name))
    if dtype is torch.float32:  # flat scales as above; all else by simt up to 16
        families = families if families.get(1) == "dense" else {1: "simt", 16: "simt", 17: "dense"}
    for m, family in families.items():
        x = random_x(m, k, dtype)
        explanation = explain(x, packed)
        assert explanation.dense == (family == "dense"), (m, explanation)
        assert explanation.instance.startswith("cuda_dequant" if explanation.dense else f"cuda_{family}_")
        assert_within_budget(run("dispatch", packed, x), x, w_exact, dense=explanation.dense)
        y = torch.full((m, 70), torch.nan, dtype=dtype, device="cuda")
        call_c(packed, x, y, "dispatch")
        assert_within_budget(y, x, w_exact)


@each_case_variant
@each_dtype
def test_identity_gives_back_the_weight(variant: Variant, dtype: torch.dtype) -> None:
    """x = I: fp32 exactly the dequantized weight; fp16 and bf16 within one rounding.

    Random codes of 33 x 130 hold every code of every format; M = 130 goes through all token tiles.
    """
    for k, group_size in [(130, None), (64, variant.group_sizes(64)[0]), (70, variant.group_sizes(70)[-1])]:
        weight = random_weight(variant, 33, k, group_size)
        packed, expected = weight.pack().to("cuda"), weight.dequantize().cuda().T
        x = torch.eye(k, dtype=dtype, device="cuda")
        for name in runs(packed, x):
            y = run(name, packed, x)
            if dtype == torch.float32:
                assert torch.equal(y, expected), (name, k)
            else:
                unit = torch.finfo(dtype).eps
                tiny = torch.finfo(dtype).smallest_normal * unit
                assert bool(((y.float() - expected).abs() <= expected.abs() * unit + tiny).all()), (name, k)


@pytest.mark.parametrize("case", range(0, len(CASES), EVERY), ids=lambda i: f"{CASES[i][0]}-{str(CASES[i][1])[6:]}")
def test_budget(case: int) -> None:
    """Every token count, odd shapes, groups of all sizes, with and without bias."""
    variant, dtype = CASES[case]
    sizes = 0
    for i, (n, k) in enumerate(EXTENTS):
        groups = variant.group_sizes(k)
        group_size = groups[(case + i) % len(groups)]
        packed, w_exact = on_gpu(make_weight(variant, n, k, group_size, seed=i))
        for j, m in enumerate(TOKENS[i % EVERY :: EVERY]):
            x = random_x(m, k, dtype)
            bias = torch.randn(n).to(dtype).cuda() if (i + j) % 2 else None
            for name in runs(packed, x):
                dense = name == "dispatch" and explain(x, packed, bias).dense
                assert_within_budget(run(name, packed, x, bias), x, w_exact, bias, dense=dense)
            sizes += 1
    assert sizes >= len(EXTENTS) * len(TOKENS) // (EVERY + 1)


@each_case_variant
def test_every_group_size(variant: Variant) -> None:
    for k in (96, 130, 320):
        for group_size in variant.group_sizes(k):
            packed, w_exact = on_gpu(random_weight(variant, 70, k, group_size))
            x = random_x(3, k, torch.float32)
            for name in runs(packed, x):
                assert_within_budget(run(name, packed, x), x, w_exact)


@each_dtype
def test_every_small_k(dtype: torch.dtype) -> None:
    for k in (*range(1, 20), *range(62, 68), *range(126, 131)):
        packed, w_exact = one_packed(130, k)
        x = random_x(8, k, dtype)  # 1040 outputs: of few, errors are as large by chance as the budget allows
        for name in runs(packed, x):
            assert_within_budget(run(name, packed, x), x, w_exact)


@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 20000), (5, 40, 70000), (300, 70, 300), (3, 5000, 64)])
def test_budget_of_long_sums_and_many_tokens(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    packed, w_exact = one_packed(n, k)
    x, bias = random_x(m, k, dtype), torch.randn(n).to(dtype).cuda()
    for name in runs(packed, x):
        assert_within_budget(run(name, packed, x, bias), x, w_exact, bias)


@pytest.mark.parametrize("name", ["nf4", "int4", "uint4", "kbit3", "nvfp4", "int8"][::EVERY])
def test_shapes_of_models(name: str) -> None:
    """Sizes for which a plan fills the GPU: clusters, several chunks of K, several tiles of a block."""
    variant = next(v for v in VARIANTS if v.format.name == name)
    for n, k in [(1024, 4096), (4096, 512), (520, 8960)]:
        packed, w_exact = on_gpu(random_weight(variant, n, k))
        for dtype, m in itertools.product(DTYPES, (1, 8) if EVERY > 1 else (1, 2, 4, 8, 16)):
            x = random_x(m, k, dtype)
            for instance in runs(packed, x):
                assert_within_budget(run(instance, packed, x), x, w_exact)


def test_large_and_small_activations() -> None:
    packed, w_exact = one_packed(65, 130)
    for scale in (1e-20, 1e-4, 1e4, 1e20):
        x = random_x(9, 130, torch.float32) * scale
        for name in runs(packed, x):
            assert_within_budget(run(name, packed, x) / scale, x / scale, w_exact)


def test_nan_and_inf_stay_in_their_row() -> None:
    """A row with NaN or Inf gives NaN or Inf, the other rows keep their bits; tails included."""
    for m, n, k in [(5, 70, 130), (70, 70, 64), (9, 33, 65)]:
        packed, _ = one_packed(n, k)
        x = random_x(m, k, torch.float32)
        for name in runs(packed, x):
            clean = run(name, packed, x)
            for bad in (float("nan"), float("inf"), -float("inf")):
                for row, column in [(0, 0), (m - 1, k - 1), (m // 2, k // 2)]:
                    dirty = x.clone()
                    dirty[row, column] = bad
                    y = run(name, packed, dirty)
                    others = torch.arange(m, device="cuda") != row
                    assert torch.equal(y[others], clean[others]), (name, bad)
                    assert not bool(torch.isfinite(y[row]).all()), (name, bad)


# ---- shapes and strides of x


@each_gemm
@each_dtype
def test_any_x(name: str, dtype: torch.dtype) -> None:
    """Strided, transposed, expanded, flipped and offset views equal their contiguous copies, bit for bit."""
    k, n = 100, 70
    # A format whose scales are not flat at this K: torch's GEMM, which the dispatch takes for those, gives other bits
    # for other strides.
    variant = next(v for v in VARIANTS if not v.format.flat_blocks)
    packed, w_exact = on_gpu(make_weight(variant, n, k))
    base = random_x(12, 3 * k + 7, dtype)
    if not covers(name, packed, base[:, :k].contiguous()):
        pytest.skip(f"{name} does not cover the problem")
    bias = torch.randn(n).to(dtype).cuda()
    flat = random_x(1, 20 * k, dtype).view(-1)
    views = {
        "row stride above K": base[:, :k],
        "storage offset": base[3:, 5 : 5 + k],
        "every second row": base[::2, :k],
        "stride 2 along k": base[:, : 2 * k : 2],
        "transposed": random_x(k, 9, dtype).T,
        "one row, many times": base[:1, :k].expand(17, k),
        "one value, many times": base[:1, :1].expand(5, k),
        "flipped k": base[:, :k].flip(1),
        "one row of a matrix": base[4:5, 1 : 1 + k],
        "no rows": base[:0, :k],
        "3-D": base[:, : 3 * k].reshape(4, 3, 3, k)[:, 1],
        "3-D expanded": base[:3, :k].expand(2, 3, k),
        "4-D": random_x(6, k, dtype).view(2, 1, 3, k),
        "1-D": base[2, :k],
        "1-D, stride 2": base[2, : 2 * k : 2],
        "no tokens, 3-D": torch.empty(2, 0, k, dtype=dtype, device="cuda"),
        "overlapping rows": flat.unfold(0, k, 7)[:9],
    }
    views |= {f"contiguous at element {i}": flat[i : i + 8 * k].view(8, k) for i in range(1, 9)}
    for what, x in views.items():
        y = run(name, packed, x, bias)
        assert y.shape == (*x.shape[:-1], n), what
        assert y.is_contiguous(), what
        assert y.device == x.device, what
        assert torch.equal(y, run(name, packed, x.contiguous().clone(), bias)), what
        assert_within_budget(y, x, w_exact, bias)


def test_linear_is_f_linear() -> None:
    """The public call: shapes and values of F.linear on the dequantized weight; gradients too."""
    weight = make_weight(VARIANTS[0], 65, 130)
    packed, w_exact = on_gpu(weight)
    dense = weight.dequantize().cuda()
    bias = torch.randn(65, device="cuda")
    for shape in [(130,), (1, 130), (20, 130), (2, 3, 130), (0, 130), (2, 0, 130), (100, 130)]:
        x = torch.randn(shape, device="cuda")
        y = linear(x, packed, bias)
        assert y.shape == F.linear(x, dense, bias).shape
        assert_within_budget(y, x, w_exact, bias)


def test_no_tokens_launch_nothing() -> None:
    packed, _ = one_packed(65, 130)
    for name, dtype in itertools.product((*DISPATCH, *GEMMS), DTYPES):
        x = torch.empty(0, 130, dtype=dtype, device="cuda")
        if covers(name, packed, x):
            y = gemm(x, packed, None, index_of(name))
            assert y.shape == (0, 65)
            assert y.dtype == dtype


# ---- the same bits


@each_dtype
def test_same_bits_in_every_call(dtype: torch.dtype) -> None:
    for m, n, k in [(1, 1024, 4096), (8, 520, 2000), (16, 130, 3000), (33, 100, 400)]:
        packed, _ = one_packed(n, k)
        x, bias = random_x(m, k, dtype), torch.randn(n).to(dtype).cuda()
        for name in runs(packed, x):
            first = run(name, packed, x, bias)
            for _ in range(100):
                assert torch.equal(run(name, packed, x, bias), first), name


def capture(call: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of the call, warmed up as torch asks for, and its output."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    return graph, y


@each_dtype
@pytest.mark.parametrize("m", [1, 8, 70])
def test_graph_replay(dtype: torch.dtype, m: int) -> None:
    """Replays read the new x, write what a call writes, and do not depend on what y held."""
    packed, _ = one_packed(520, 1000)
    bias = torch.randn(520).to(dtype).cuda()
    x = random_x(m, 1000, dtype)
    for name in runs(packed, x):
        graph, y = capture(lambda name=name: gemm(x, packed, bias, index_of(name)))
        for _ in range(5):
            x.copy_(random_x(m, 1000, dtype))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, gemm(x, packed, bias, index_of(name))), name


def test_two_graphs_at_once() -> None:
    """The kernels of two graphs that run at the same time share nothing."""
    problems = [one_packed(1024, 4096), one_packed(1500, 3000)]
    graphs, inputs = [], []
    for i, (packed, _) in enumerate(problems):
        for dtype in DTYPES:
            x = random_x(4 * i + 1, packed.k, dtype)
            inputs.append(x)  # a graph does not keep alive what it reads
            for name in runs(packed, x):
                call = functools.partial(gemm, x, packed, None, index_of(name))
                graphs.append((*capture(lambda call=call: torch.stack([call() for _ in range(10)])), call()))
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    assert len(graphs) >= 2 * len(DTYPES)
    for i in range(len(graphs)):
        pair = [graphs[i], graphs[(i + len(graphs) // 2) % len(graphs)]]
        for _, y, _ in pair:
            y.fill_(torch.nan)
        torch.cuda.synchronize()
        for _ in range(5):
            for stream, (graph, _, _) in zip(streams, pair, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for _, y, expected in pair:
            assert torch.equal(y, expected.expand_as(y))


# ---- streams, threads, devices


def sleep(seconds: float = 0.2) -> None:
    """Keeps the current stream busy."""
    torch.cuda._sleep(int(seconds * 1.5e9))  # cycles, at about 1.5 GHz


@each_dtype
def test_work_goes_to_the_current_stream(dtype: torch.dtype) -> None:
    """On a side stream the kernel runs after what was queued there: x is written late."""
    packed, _ = one_packed(65, 130)
    new = random_x(8, 130, dtype)
    for name in runs(packed, new):
        expected = run(name, packed, new)
        x = torch.zeros_like(new)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sleep(0.02)
            x.copy_(new)
            y = gemm(x, packed, None, index_of(name))
        stream.synchronize()
        assert torch.equal(y, expected), name


@each_dtype
@pytest.mark.parametrize("m", [1, 8, 16])
def test_a_call_allocates_its_output_only_and_does_not_wait(dtype: torch.dtype, m: int) -> None:
    packed, _ = one_packed(1024, 4096)
    x, bias = random_x(m, 4096, dtype), torch.randn(1024).to(dtype).cuda()
    for name in runs(packed, x):
        gemm(x, packed, bias, index_of(name))
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()
        sleep()
        done = torch.cuda.Event()
        y = gemm(x, packed, bias, index_of(name))
        done.record()
        waited = done.query()
        after = torch.cuda.memory_stats()
        torch.cuda.synchronize()
        assert not waited, f"{name}: the call came back after the stream's work"
        if name != "dispatch":  # which may dequantize into a tensor of its own
            assert after["allocation.all.allocated"] - before["allocation.all.allocated"] == 1, name
        assert after["num_device_alloc"] - before["num_device_alloc"] <= 1, name
        del y


def test_two_threads_at_once() -> None:
    """Concurrent calls from two host threads, each on its own stream, on one weight and on different ones."""
    problems = []
    for i, m in enumerate((1, 9, 70, 4)):
        packed, _ = one_packed(65 + 400 * i, 100 + 640 * i, seed=i)
        problems.append((random_x(m, packed.k, DTYPES[i % 3]), packed))
    calls = [(x, packed, name) for x, packed in problems for name in runs(packed, x)]
    expected = [run(name, packed, x) for x, packed, name in calls]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(offset: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(200):
                at = (i + offset) % len(calls)
                x, packed, name = calls[at]
                if not torch.equal(gemm(x, packed, None, index_of(name)), expected[at]):
                    failures.append(name)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


needs_two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs two GPUs, torch sees {torch.cuda.device_count()}"
)


@needs_two_gpus
def test_two_gpus() -> None:
    """A call runs where x is, whichever device is current; results are the first GPU's."""
    packed, _ = one_packed(520, 1000)
    there = packed.to("cuda:1")
    bias = torch.randn(520)
    for dtype, current in itertools.product(DTYPES, (0, 1)):
        x, b = random_x(4, 1000, dtype), bias.to("cuda:0", dtype)
        for name in runs(packed, x):
            expected = run(name, packed, x, b)
            with torch.cuda.device(current):
                y = gemm(x.to("cuda:1"), there, b.to("cuda:1"), index_of(name))
                assert torch.cuda.current_device() == current
            assert y.device == torch.device("cuda:1")
            assert torch.equal(y.to("cuda:0"), expected), (name, current)
        with pytest.raises(RuntimeError, match=r"gemm: codes: expected a contiguous CUDA:1 tensor of Byte, got CUDA:0"):
            linear(x.to("cuda:1"), packed)


@needs_two_gpus
def test_the_second_gpu_is_the_first_to_run() -> None:
    """What is kept per device and kernel (allowed shared memory, properties, plans) was never asked of device 0."""
    script = (
        "import torch, pyquant\n"
        "w = pyquant.quantize(torch.randn(520, 1024, device='cuda:1'), 'nf4')\n"
        "packed = w.pack()\n"
        "exact = w.dequantize().double()\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    for m in (1, 8, 16, 40):\n"
        "        x = torch.randn(m, 1024, device='cuda:1').to(dtype)\n"
        "        y, ref = pyquant.linear(x, packed), x.double() @ exact.T\n"
        "        assert y.device == x.device and torch.cuda.current_device() == 0\n"
        "        assert float((y.double() - ref).norm() / ref.norm()) < 1e-2\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


@needs_two_gpus
def test_two_gpus_from_two_threads() -> None:
    """Each thread on a device of its own, and both threads on both devices in turns."""
    problems = []
    for i, m in enumerate((1, 9, 70, 4)):
        packed, _ = one_packed(65 + 400 * i, 100 + 640 * i, seed=i)
        x = random_x(m, packed.k, DTYPES[i % 3])
        problems += [(name, run(name, packed, x).cpu(), packed, x) for name in runs(packed, x)]
    placed = [
        [(name, expected, packed.to(f"cuda:{d}"), x.to(f"cuda:{d}")) for name, expected, packed, x in problems]
        for d in range(2)
    ]
    for d in range(2):
        torch.cuda.synchronize(d)
    failures: list[str] = []

    def work(thread: int, alternate: bool) -> None:
        for i in range(100):
            device = (thread + i) % 2 if alternate else thread
            name, expected, packed, x = placed[device][i % len(problems)]
            y = gemm(x, packed, None, index_of(name))
            if y.device != x.device or not torch.equal(y.cpu(), expected):
                failures.append(f"{name} on device {device}")

    for alternate in (False, True):
        threads = [threading.Thread(target=work, args=(i, alternate)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


# ---- memory


def test_y_is_written_where_nan_stood() -> None:
    """What the poison of these tests is worth: y does lie in the memory that held NaN."""
    packed, _ = one_packed(520, 1000)
    x = random_x(8, 1000, torch.float32)
    torch.cuda.synchronize()
    address = poison((8, 520), torch.float32)
    y = gemm(x, packed, None, index_of("cuda_simt_fp32"))  # the dispatch may dequantize into a tensor of its own
    assert y.data_ptr() == address
    assert bool(torch.isfinite(y).all())


class Guarded:
    """Copies of tensors in the middle of larger buffers, and the check that nothing around them changed."""

    def __init__(self) -> None:
        self.buffers: list[tuple[torch.Tensor, int]] = []

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        guard, size = 256, t.numel() * t.element_size()
        # 0xFF.. is a NaN in every floating-point type: what is read beyond t by mistake spoils the result.
        buffer = torch.full((guard + size + guard,), 0xFF, dtype=torch.uint8, device="cuda")
        inside = buffer[guard : guard + size]
        inside.copy_(t.detach().contiguous().reshape(-1).view(torch.uint8))
        self.buffers.append((buffer, size))
        return inside.view(t.dtype).view(t.shape)

    def check(self) -> None:
        assert self.buffers
        for buffer, size in self.buffers:
            assert bool((buffer[:256] == 0xFF).all())
            assert bool((buffer[256 + size :] == 0xFF).all())


@each_dtype
@each_case_variant
def test_nothing_is_read_or_written_beside(variant: Variant, dtype: torch.dtype) -> None:
    """Weight, x and bias lie between NaNs and stay as they are; rows of y stay apart (ldy > N), with poison between."""
    for m, n, k in [(1, 1, 1), (3, 65, 63), (8, 130, 100), (17, 64, 64), (4, 33, 520)]:
        guarded = Guarded()
        weight = make_weight(variant, n, k)
        w_exact = exact_weight(weight).cuda()
        packed = weight.pack().map_tensors(guarded)
        x, bias = guarded(random_x(m, k, dtype)), guarded(torch.randn(n).to(dtype))
        before = [buffer.clone() for buffer, _ in guarded.buffers]
        for name in runs(packed, x):
            if name == "dispatch" and not packed_gemm(packed, x):
                continue
            for ldy in (n, n + 5, n + 64):
                item = x.element_size()
                buffer = torch.full((256 + m * ldy * item + 256,), POISON, dtype=torch.uint8, device="cuda")
                y = buffer[256 : 256 + m * ldy * item].view(dtype).view(m, ldy)
                call_c(packed, x, y, name, bias=bias)
                assert_within_budget(y[:, :n].contiguous(), x, w_exact, bias)
                y[:, :n] = torch.full((1,), POISON, dtype=torch.uint8, device="cuda").repeat(item).view(dtype)
                assert bool((buffer == POISON).all()), (name, m, n, k, ldy)
        guarded.check()
        assert all(torch.equal(a, b) for (a, _), b in zip(guarded.buffers, before, strict=True))


def packed_gemm(packed: PackedWeight, x: torch.Tensor) -> bool:
    """Whether cx_gemm alone can run the problem, without the caller's dense GEMM."""
    return any(covers(name, packed, x) for name in GEMMS)


def test_leading_dimension_zero_repeats_a_row() -> None:
    packed, w_exact = one_packed(33, 70)
    x = random_x(1, 70, torch.float32)
    for name in runs(packed, x):
        y = torch.full((12, 33), torch.nan, device="cuda")
        call_c(packed, x.expand(12, 70), y, name)
        assert_within_budget(y, x.expand(12, 70), w_exact)


# ---- programmatic dependent launch

PDL = 1  # CX_GEMM_PROGRAMMATIC_LAUNCH
REPLAYS = 50


def gemm_pdl(x: torch.Tensor, packed: PackedWeight, name: str, pdl: bool) -> torch.Tensor:
    if name == "dispatch":
        return linear(x, packed, pdl=pdl)
    return gemm(x, packed, None, index_of(name), pdl=pdl)


@each_dtype
@pytest.mark.parametrize("m", [1, 8])
def test_programmatic_launch_waits_for_x(dtype: torch.dtype, m: int) -> None:
    """x of each kernel is y of the one before: a kernel that reads x too early reads the last replay's."""
    packed, _ = one_packed(2048, 2048)
    x = random_x(m, 2048, dtype)

    def chain(name: str, pdl: bool) -> torch.Tensor:
        values = [x]
        for _ in range(12):
            y = gemm_pdl(values[-1], packed, name, pdl)
            values.append(y / y.abs().amax() if len(values) % 4 == 0 else y * 0.02)
        for _ in range(4):
            values.append(gemm_pdl(values[-1] * 0.02, packed, name, pdl))
            values.append(gemm_pdl(gemm_pdl(values[-1], packed, name, pdl), packed, name, pdl))
        return torch.stack(values)

    for name in runs(packed, x):
        graph, y = capture(lambda name=name: chain(name, True))
        for _ in range(REPLAYS):
            x.copy_(random_x(m, 2048, dtype))
            expected = chain(name, False)
            graph.replay()
            assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7)), name


@each_dtype
def test_programmatic_launch_waits_before_it_writes_y(dtype: torch.dtype) -> None:
    """The kernel before still reads the memory that y goes to: another GEMM whose x it is, and a reduction."""
    m = 8
    reader, _ = one_packed(4096, 2048)  # reads Y for long
    writer, _ = one_packed(2048, 64, seed=1)  # is done at once, if nothing holds it
    x, source = random_x(m, 64, dtype), random_x(m, 2048, dtype)
    for name in runs(writer, x):
        if not covers(name, reader, source) or (name == "dispatch" and not packed_gemm(writer, x)):
            continue
        memory = torch.empty_like(source)
        read, reduced = torch.empty(m, 4096, dtype=dtype, device="cuda"), torch.empty(m, dtype=dtype, device="cuda")

        def step(name: str = name, memory: torch.Tensor = memory, read: torch.Tensor = read) -> torch.Tensor:
            torch.add(source, 0, out=memory)
            call_c(reader, memory, read, name, flags=PDL)
            call_c(writer, x, memory, name, flags=PDL)
            torch.add(source, 0, out=memory)
            torch.sum(memory, dim=1, out=reduced)  # noqa: B023
            call_c(writer, x, memory, name, flags=PDL)
            return memory

        graph, _ = capture(step)
        expected_read = torch.empty_like(read)
        call_c(reader, source, expected_read, name)
        expected_y = torch.empty_like(memory)
        call_c(writer, x, expected_y, name)
        for _ in range(REPLAYS):
            for t in (memory, read, reduced):
                t.fill_(torch.nan)
            graph.replay()
            assert torch.equal(read, expected_read), name
            assert torch.equal(reduced, source.sum(dim=1)), name
            assert torch.equal(memory, expected_y), name


def test_programmatic_launch_into_reused_memory() -> None:
    """The graph's pool gives y the memory of a tensor that the kernel before has just read."""
    packed, _ = one_packed(2048, 2048)
    x = random_x(8, 2048, torch.float32)

    def step(pdl: bool) -> torch.Tensor:
        results = []
        for _ in range(8):
            hidden = linear(x, packed, pdl=pdl)
            results.append(linear(hidden, packed, pdl=pdl))
            del hidden  # the next y may lie there
        return torch.stack(results)

    expected = step(False)
    graph, y = capture(lambda: step(True))
    for _ in range(REPLAYS):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


# ---- large problems


def repeated(packed: PackedWeight, times: int) -> PackedWeight:
    """The weight `times` times along N: slabs of 64 rows lie one behind the other."""
    assert packed.n % 64 == 0
    assert packed.scale_data is None
    tensors = {"codes": packed.codes.repeat(times), "scales": packed.scales.repeat(times)}
    if packed.zeros is not None:
        tensors["zeros"] = packed.zeros.repeat(times)
    return type(packed)(
        packed.format, packed.n * times, packed.k, packed.group_size, packed.scale_type, packed.zero_type,
        codebook=packed.codebook, **{"zeros": None, **tensors},
    )  # fmt: skip


def assert_repeats(y: torch.Tensor, x: torch.Tensor, w_exact: torch.Tensor) -> None:
    n = w_exact.shape[0]
    for start in range(0, y.shape[1], n):
        assert_within_budget(y[:, start : start + n].contiguous(), x, w_exact)


@each_dtype
@pytest.mark.parametrize("m", [1, 8, 33])
def test_vocabulary_of_128256(dtype: torch.dtype, m: int) -> None:
    small, w_exact = one_packed(64 * 12, 1024)
    packed = repeated(small, 167)
    assert packed.n == 128256
    x = random_x(m, 1024, dtype)
    for name in runs(packed, x):
        assert_repeats(run(name, packed, x), x, w_exact)


@each_dtype
def test_weight_above_two_gib(dtype: torch.dtype) -> None:
    small, w_exact = one_packed(64, 32768)
    packed = repeated(small, 2050)
    assert packed.codes.nbytes > 2**31
    x = random_x(2, 32768, dtype)
    for name in GEMMS:
        if covers(name, packed, x):
            y = run(name, packed, x)
            assert_within_budget(y[:, :64].contiguous(), x, w_exact)
            assert_within_budget(y[:, -64:].contiguous(), x, w_exact)
            assert torch.equal(y, y[:, :64].repeat(1, 2050)), name


@each_dtype
def test_131072_tokens(dtype: torch.dtype) -> None:
    """Also M * N above 2^31."""
    m = 131072
    for n, k in [(48, 64), (16448, 32)]:
        packed, w_exact = one_packed(n, k)
        x = random_x(m, k, dtype)
        names = list(runs(packed, x)) if n == 48 else [n for n in GEMMS if covers(n, packed, x)]
        assert names
        for name in names:
            y = run(name, packed, x)
            for rows in (slice(0, 4096), slice(m - 4096, m), slice(m // 2 - 5, m // 2 + 5)):
                assert_within_budget(y[rows], x[rows], w_exact)
            assert bool(torch.isfinite(y).all())
            del y


# ---- errors


def test_errors_on_the_gpu() -> None:
    packed, _ = one_packed(33, 70)
    on_cpu = packed.to("cpu")
    x = random_x(2, 70, torch.float32)
    bias = torch.zeros(33, device="cuda")
    wrong: list[tuple[Callable[[], torch.Tensor], str]] = [
        (
            lambda: linear(x, on_cpu),
            r"^gemm: codes: expected a contiguous CUDA:0 tensor of Byte, got CPU tensor of Byte",
        ),
        (
            lambda: linear(x.cpu(), packed),
            r"^gemm: codes: expected a contiguous CPU tensor of Byte, got CUDA:0 tensor of Byte",
        ),
        (lambda: linear(x[:, :69], packed), r"^gemm: x has K=69, the weight has K=70"),
        (lambda: linear(x.double(), packed), r"^gemm: x: expected Float, Half or BFloat16, got Double"),
        (lambda: linear(x.long(), packed), r"^gemm: x: expected Float, Half or BFloat16, got Long"),
        (lambda: linear(x[0, 0], packed), r"^gemm: x has a scalar, the weight has K=70"),
        (lambda: linear(x, packed, bias[:32]), r"^gemm: bias: expected shape \[N=33\], got 32 values in 1 dimensions"),
        (
            lambda: linear(x, packed, bias.half()),
            r"^gemm: bias: expected a contiguous CUDA:0 tensor of Float, got CUDA:0 tensor of Half",
        ),
        (
            lambda: linear(x, packed, bias.cpu()),
            r"^gemm: bias: expected a contiguous CUDA:0 tensor of Float, got CPU tensor of Float",
        ),
    ]
    good = linear(x, packed, bias)
    for call, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            call()
        assert torch.equal(linear(x, packed, bias), good)  # the next call is right
    torch.cuda.synchronize()


def test_a_kernel_of_another_dtype_or_device_is_refused() -> None:
    packed, _ = one_packed(33, 70)
    x = random_x(2, 70, torch.float32)
    refused = 0
    for name in GEMMS:
        for dtype in DTYPES:
            if not covers(name, packed, x.to(dtype)):
                with pytest.raises(RuntimeError, match=rf"^gemm: instance: {name} {NOT_COVERED}"):
                    gemm(x.to(dtype), packed, None, index_of(name))
                refused += 1
        with pytest.raises(RuntimeError, match=rf"^gemm: instance: expected a GEMM for the CPU, got {name}"):
            gemm(x.cpu(), packed.to("cpu"), None, index_of(name))
    cpu = next(i for i, row in enumerate(_library.instances()) if row["device"] == "cpu" and row["is_gemm"])
    with pytest.raises(RuntimeError, match=r"^gemm: instance: expected a GEMM for the GPU, got cpu_"):
        gemm(x, packed, None, cpu)
    assert refused > 0


def test_misaligned_weight_is_refused() -> None:
    """Kernels read packed weights in 16-byte pieces: an address between them is an error, not a fault."""
    packed, w_exact = one_packed(33, 70)
    x = random_x(2, 70, torch.float32)
    buffer = torch.empty(packed.codes.numel() + 16, dtype=torch.uint8, device="cuda")
    moved = buffer[1 : 1 + packed.codes.numel()]
    moved.copy_(packed.codes)
    tensors, spec = op_arguments(packed)
    with pytest.raises(RuntimeError, match=r"^gemm: "):
        torch.ops.pyquant.gemm(x, moved, *tensors[1:], None, *spec)
    assert_within_budget(linear(x, packed), x, w_exact)
