"""The GPU benchmark: every provider on every problem, in one process.

Protocol: the time of a call in a CUDA graph of many calls. Every call reads another copy of the weight, the copies
together at least eight times the L2 cache, as in a model whose layers follow each other; x is hot; every call has its
own y. The floor of a row is the time of a kernel that reads as many bytes as the row's weight has, measured the same
way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F

from . import device
from .environment import Environment
from .graph_timing import MIN_COPIES, Call, cold_copies, time_do_bench, time_graph
from .problem import DTYPE_NAMES, Problem
from .providers import Floor, Operand, Provider, Source, Unavailable
from .providers.packed import Instance
from .rows import INCORRECT, PASSED, Row

COLD_L2S = 8
# docs/numerics.md: within 1.5 times the error of rounding the weight to x's dtype.
ERROR_BUDGET = 1.5
# Of fp32, where both sides of the comparison round alike.
ERROR_FLOOR = 1e-5
# Other libraries may round as they like: a wrong layout or scale is far above this.
PEER_ERROR = 0.05


class BrokenDevice(RuntimeError):
    """A kernel failed in a way after which the process cannot use the GPU."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: Sequence[tuple[int, int]]  # (N, K)
    tokens: Sequence[int]
    dtype: torch.dtype
    providers: Sequence[Provider]
    cold: bool = True
    do_bench: bool = False

    @property
    def cells(self) -> int:
        return len(self.shapes) * len(self.providers) * len(self.tokens)


@dataclass(frozen=True)
class Skip:
    """A cell without a row."""

    label: str
    reason: str
    failed: bool  # it should have run: not merely not available


@dataclass
class _Others:
    """The fastest figures so far of one shape, by M."""

    cublas: dict[int, float] = field(default_factory=dict)
    best: dict[int, tuple[float, str]] = field(default_factory=dict)

    def add(self, m: int, provider: Provider, us: float) -> None:
        if provider.name == "cublas":
            self.cublas[m] = us
        if not provider.ours and us < self.best.get(m, (float("inf"), ""))[0]:
            self.best[m] = us, provider.label


def measure(plan: Plan, environment: Environment) -> Iterator[Row | Skip]:
    """One item for each cell, in the order of shapes, providers, tokens; a Skip more where there is no floor.

    Raises:
        BrokenDevice: naming who broke it.
    """
    cold_bytes = COLD_L2S * device.l2_bytes() if plan.cold else 0
    floor = Floor(cold_bytes)
    for n, k in plan.shapes:
        source = Source(n, k, plan.dtype)
        others = _Others()
        for provider in plan.providers:
            yield from _measure_provider(plan, environment, floor, cold_bytes, source, provider, others)
            # Copies of the next provider need the memory of this one's.
            device.release()


def _measure_provider(
    plan: Plan,
    environment: Environment,
    floor: Floor,
    cold_bytes: int,
    source: Source,
    provider: Provider,
    others: _Others,
) -> Iterator[Row | Skip]:
    try:
        operand = provider.build(source)
        calls = cold_calls(operand, cold_bytes)
        reference = None if operand.reference is None else operand.reference()
    except Exception as error:
        skip = _skip(provider, error)
        yield from [skip] * len(plan.tokens)
        return
    try:
        floor_us = floor.us(operand.nbytes)
    except Unavailable as error:
        floor_us = None
        yield Skip("floor", str(error), failed=False)
    for m in plan.tokens:
        problem = Problem(m, source.n, source.k, plan.dtype)
        try:
            yield _row(plan, environment, provider, problem, operand, calls, reference, floor_us, others)
        except Exception as error:
            yield _skip(provider, error)


def _skip(provider: Provider, error: Exception) -> Skip:
    """What the user is told about ``error``.

    Raises:
        BrokenDevice: when the GPU does not answer any more.
    """
    reason = str(error) if isinstance(error, Unavailable) else f"{type(error).__name__}: {_first_line(error)}"
    try:
        device.synchronize()
    except RuntimeError as broken:
        raise BrokenDevice(f"{provider.label}: {reason}; after it the GPU reports: {_first_line(broken)}") from error
    # An instance need not support every problem; pyquant's own dispatch must.
    must_run = provider.ours and not isinstance(provider, Instance)
    return Skip(provider.label, reason, must_run and not isinstance(error, Unavailable))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def cold_calls(operand: Operand, cold_bytes: int) -> list[Call]:
    """Calls on copies of the weight; without ``cold_bytes`` on one."""
    count = cold_copies(operand.nbytes, cold_bytes)
    free = device.free_bytes()
    # Half of what is free stays for x, y, and what kernels allocate.
    fitting = 1 + free // 2 // operand.nbytes
    needed = min(count, MIN_COPIES)
    if fitting < needed:
        gb, free_gb = operand.nbytes / 1e9, free / 1e9
        raise Unavailable(f"{needed} copies of {gb:.1f} GB do not fit in {free_gb:.1f} GB of free GPU memory")
    return operand.copies(min(count, fitting))


def _row(
    plan: Plan,
    environment: Environment,
    provider: Provider,
    problem: Problem,
    operand: Operand,
    calls: Sequence[Call],
    reference: torch.Tensor | None,
    floor_us: float | None,
    others: _Others,
) -> Row:
    generator = torch.Generator(device=device.NAME).manual_seed(problem.m)
    x = torch.randn(problem.m, problem.k, device=device.NAME, generator=generator).to(problem.dtype)
    with torch.inference_mode():
        timing = time_graph(calls, x, problem.m * problem.n * problem.dtype.itemsize)
        check, error = check_outputs(provider.ours, x, reference, timing.outputs)
        do_bench_us = time_do_bench(calls[0], x) if plan.do_bench else None
    us = timing.us
    others.add(problem.m, provider, us)
    cublas = others.cublas.get(problem.m)
    best_us, best_peer = others.best.get(problem.m, (None, "")) if provider.ours else (None, "")
    return Row(
        m=problem.m,
        n=problem.n,
        k=problem.k,
        format=operand.format,
        group_size=operand.group_size,
        dtype=DTYPE_NAMES[problem.dtype],
        provider=provider.label,
        instance=provider.instance(operand, x),
        us=round(us, 3),
        us_p10=round(timing.us_p10, 3),
        us_p90=round(timing.us_p90, 3),
        do_bench_us=None if do_bench_us is None else round(do_bench_us, 3),
        copies=len(calls),
        weight_bytes=operand.nbytes,
        gb_per_s=round(operand.nbytes / us / 1e3, 1),
        tflops=round(problem.flops / us / 1e6, 3),
        floor_us=None if floor_us is None else round(floor_us, 3),
        floor_fraction=None if floor_us is None else round(floor_us / us, 4),
        ratio_to_cublas=None if cublas is None else round(cublas / us, 4),
        best_peer=best_peer,
        ratio_to_best_peer=None if best_us is None else round(best_us / us, 4),
        check=check,
        error=error,
        **asdict(environment),
    )


def check_outputs(
    ours: bool,
    x: torch.Tensor,
    reference: torch.Tensor | None,
    outputs: Sequence[torch.Tensor],
    bias: torch.Tensor | None = None,
) -> tuple[str, float | None]:
    """The worst of all y of the graph against F.linear of the dequantized weight in fp32."""
    if reference is None:
        return "", None
    b = None if bias is None else bias.float()
    exact = F.linear(x.float(), reference, b)
    norm = exact.norm()
    base = ((F.linear(x, reference.to(x.dtype), bias).float() - exact).norm() / norm).item()
    # NaN is not below any budget, and max() of tensors passes it on.
    error = torch.stack([(y.float() - exact).norm() / norm for y in outputs]).max().item()
    budget = max(ERROR_BUDGET * base, ERROR_FLOOR) if ours else PEER_ERROR
    return PASSED if error <= budget else INCORRECT, round(error, 7)
