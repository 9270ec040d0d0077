"""Measuring GEMMs on the CPU: who takes part, and how a time is taken.

Protocol: every provider of a row runs on the same x and the same weights, in turns, so that a slow moment of the
machine hits all of them; the figure is the median over the rounds. Cold weights: each call takes the next of several
copies that together exceed the last-level cache, as in a model whose layers follow each other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..nn import QuantLinear
from ..ops import linear, op_arguments
from ..weight import PackedWeight
from .format_spec import FormatSpec
from .problem import Problem

Call = Callable[[torch.Tensor], torch.Tensor]

# Together the copies of a cold weight hold at least this much: more than twice the last-level cache of current servers'
# core groups. Counted on 4-bit weights; 16-bit copies hold four times as much.
COLD_BYTES = 96 << 20
INT4PACK_GROUP = 64


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of one provider on one problem."""

    problem: Problem
    provider: str
    median: float
    best: float


def copies_for(problem: Problem, cold: bool) -> int:
    """How many copies of the weight take part."""
    return max(2, -(-COLD_BYTES // (problem.n * problem.k // 2))) if cold else 1


def providers(problem: Problem, formats: Sequence[FormatSpec], copies: int) -> dict[str, list[Call]]:
    """Every provider's call on each copy of the weight.

    ``F.linear`` reads the weight dequantized beforehand; ``dequantize + F.linear`` dequantizes in every call;
    ``int4pack`` is torch's own CPU kernel for 4-bit weights.
    """
    w = torch.randn(problem.n, problem.k) * problem.k**-0.5
    calls: dict[str, list[Call]] = {}
    for spec in formats:
        packed = spec.quantize(w).pack()
        weights = [packed.map_tensors(torch.clone) for _ in range(copies)]
        calls[f"pyquant {spec}"] = [_packed_call(p) for p in weights]
        if spec == formats[0]:
            calls["dequantize + F.linear"] = [_dequantized_call(p) for p in weights]
            # 16-bit and 32-bit copies exceed the cache with fewer of them.
            dense = [packed.dequantize(problem.dtype) for _ in range(max(1, copies // 4))]
            calls["F.linear"] = [_dense_call(d) for d in dense]
    int4pack = _int4pack_calls(problem, copies)
    if int4pack:
        calls["int4pack"] = int4pack
    return calls


def _packed_call(weight: PackedWeight) -> Call:
    return lambda x: linear(x, weight)


def _dense_call(weight: torch.Tensor) -> Call:
    return lambda x: F.linear(x, weight)


def _dequantized_call(weight: PackedWeight) -> Call:
    return lambda x: F.linear(x, weight.dequantize(x.dtype))


def _int4pack_calls(problem: Problem, copies: int) -> list[Call]:
    """``_weight_int4pack_mm_for_cpu`` on random codes; empty where its shapes do not allow it."""
    if problem.n % 16 or problem.k % INT4PACK_GROUP:
        return []
    codes = torch.randint(0, 16, (problem.n, problem.k), dtype=torch.int32)
    scales = torch.randn(problem.k // INT4PACK_GROUP, problem.n, 2).to(problem.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)

    def call(weight: torch.Tensor) -> Call:
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, INT4PACK_GROUP, scales)

    return [call(packed.clone()) for _ in range(copies)]


def measure(
    problem: Problem, formats: Sequence[FormatSpec], *, cold: bool = True, seconds: float = 1.0
) -> list[Measurement]:
    """Time all providers on one problem, in turns, for about ``seconds`` each; at least 7 rounds, or 2 if those would
    take more than four times as long."""
    x = torch.randn(problem.m, problem.k).to(problem.dtype)
    calls = providers(problem, formats, copies_for(problem, cold))
    cycles = {name: itertools.cycle(list_of_calls) for name, list_of_calls in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for cycle in cycles.values():  # warm up: threads, workspaces
        next(cycle)(x)
    start = time.perf_counter()
    budget = seconds * len(calls)
    rounds = 0
    while (spent := time.perf_counter() - start) < budget or rounds < (7 if spent < 4 * budget else 2):
        rounds += 1
        for name, cycle in cycles.items():
            call = next(cycle)
            before = time.perf_counter()
            call(x)
            times[name].append(time.perf_counter() - before)
    return [Measurement(problem, name, statistics.median(t), min(t)) for name, t in times.items()]


def time_calls(calls: Sequence[Call], x: torch.Tensor, seconds: float) -> list[float]:
    """Seconds of each call on ``x``, the copies of the weight in turns, for about ``seconds``; at least 7, or 2 if
    those would take more than four times as long. One call before the first does not count."""
    calls[-1](x)
    times: list[float] = []
    start = time.perf_counter()
    for call in itertools.cycle(calls):
        spent = time.perf_counter() - start
        if spent >= seconds and len(times) >= (7 if spent < 4 * seconds else 2):
            break
        before = time.perf_counter()
        call(x)
        times.append(time.perf_counter() - before)
    return times


def call_overhead(calls: int = 20_000) -> dict[str, float]:
    """Seconds of a call on one row of x and a 64 x 64 weight, in inference mode, by name of what is called.

    What ``QuantLinear`` adds is its row less the operator's, to be compared with ``nn.Linear`` less ``F.linear``. The
    kernel's part is below 2 us. All take turns; the figure is the best of 10 rounds.
    """
    dense = torch.nn.Linear(64, 64, bias=False)
    module = QuantLinear.from_linear(dense, "nf4")
    packed = module.weight
    tensors, integers = op_arguments(packed)
    operator = torch.ops.pyquant.gemm.default
    x = torch.randn(1, 64)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "torch.ops.pyquant.gemm": lambda: operator(x, *tensors, None, *integers),
        "pyquant.linear": lambda: linear(x, packed),
        "pyquant.nn.QuantLinear": lambda: module(x),
        "F.linear": lambda: F.linear(x, dense.weight),
        "nn.Linear": lambda: dense(x),
    }
    best = dict.fromkeys(candidates, float("inf"))
    with torch.inference_mode():
        for _ in range(10):
            for name, call in candidates.items():
                start = time.perf_counter()
                for _ in range(calls // 10):
                    call()
                best[name] = min(best[name], (time.perf_counter() - start) / (calls // 10))
    return best
