"""GPU time of a call: a CUDA graph of many calls, replayed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Call = Callable[[torch.Tensor], Any]

REPLAYS = 15
MIN_COPIES = 3
# Of weights so small that more of them would not overflow the cache in a reasonable graph.
MAX_COPIES = 1024
# A graph is no shorter than this many calls, so that its own start (about 2 us) does not count.
MIN_CALLS = 16
# Calls above this are long enough that fewer of them suffice; a replay is then about _REPLAY_US long.
_LONG_CALL_US = 1000.0
_REPLAY_US = 40_000.0
# Of replays before those that count: after a pause, in which the host packs and checks weights, the GPU takes some
# ms to come back to its clocks. With 2 replays the first M of every weight was 5 to 20% slow (28672 x 4096, int4:
# M = 1 22.9 us, M = 4 19.0; H200, 2026-11-21).
_WARM_UP_MS = 30.0
_MOST_WARM_UPS = 1000


@dataclass(frozen=True)
class Timing:
    """us per call over the replays, and what the graph's calls returned."""

    us: float  # median
    us_p10: float
    us_p90: float
    outputs: list[Any]


def cold_copies(nbytes: int, cold_bytes: int) -> int:
    """How many copies of ``nbytes`` hold ``cold_bytes`` together, within MIN_COPIES and MAX_COPIES; 1 if nothing is to
    be cold."""
    if not cold_bytes:
        return 1
    return min(MAX_COPIES, max(MIN_COPIES, -(-cold_bytes // nbytes)))


def time_graph(calls: Sequence[Call], x: torch.Tensor, output_bytes: int) -> Timing:
    """Time ``calls``, each on ``x``, in turns, in one graph.

    Args:
        calls: one for each copy of the weight.
        output_bytes: of one call's y. All of them are alive in the graph, each in memory of its own; the number
            of calls is limited so that they take an eighth of the GPU's memory.
    """
    long_us = _warm_up(calls, x)
    count = max(len(calls), MIN_CALLS)
    if long_us > _LONG_CALL_US:
        count = min(count, max(2, round(_REPLAY_US / long_us)))
    memory = torch.cuda.get_device_properties(x.device).total_memory
    count = max(2, min(count, memory // 8 // max(1, output_bytes)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(x) for call in itertools.islice(itertools.cycle(calls), count)]
    return Timing(*_replay(graph.replay, count), outputs)


def time_stream(calls: Sequence[Call], x: torch.Tensor) -> Timing:
    """The same without a graph: calls launched one by one on the current stream, so that the host's time counts where
    it is the longer one."""
    long_us = _warm_up(calls, x)
    count = max(len(calls), MIN_CALLS)
    if long_us > _LONG_CALL_US:
        count = min(count, max(2, round(_REPLAY_US / long_us)))

    def round_of_calls() -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call(x)

    return Timing(*_replay(round_of_calls, count), [calls[0](x)])


def _warm_up(calls: Sequence[Call], x: torch.Tensor) -> float:
    """Run what must not run for the first time in a capture (compilation, tuning, handles); us of a later call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call(x)
        start.record()
        calls[0](x)
        stop.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3


def _replay(replay: Callable[[], None], calls: int) -> tuple[float, float, float]:
    """Median, p10 and p90 of us per call, of which ``replay`` queues ``calls``.

    Replays are queued behind each other without waiting, so that the host's time to launch a graph is hidden.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    replay()
    events[0].record()
    replay()
    events[1].record()
    events[1].synchronize()
    for _ in range(min(_MOST_WARM_UPS, math.ceil(_WARM_UP_MS / events[0].elapsed_time(events[1])))):
        replay()
    for i, event in enumerate(events):
        event.record()
        if i < REPLAYS:
            replay()
    torch.cuda.synchronize()
    us = [a.elapsed_time(b) * 1e3 / calls for a, b in itertools.pairwise(events)]
    median, p10, p90 = np.percentile(us, [50, 10, 90])
    return float(median), float(p10), float(p90)


def time_do_bench(call: Call, x: torch.Tensor) -> float:
    """Median us of one call by ``triton.testing.do_bench``, which flushes the L2 before each and times it with events
    around it: launch latency counts.

    Raises:
        ImportError: without triton.
    """
    from triton.testing import do_bench

    return float(do_bench(lambda: call(x), warmup=10, rep=50, return_mode="median")) * 1e3
