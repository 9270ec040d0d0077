"""Decoding as a server does it: a prompt at once, then a token of each sequence at a time, in one of several modes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .decoder import Decoder

EAGER, COMPILE, GRAPH, COMPILE_GRAPH = "eager", "compile", "graph", "compile-graph"
MODES = {"cuda": (EAGER, GRAPH, COMPILE, COMPILE_GRAPH), "cpu": (EAGER, COMPILE)}
_COMPILED = (COMPILE, COMPILE_GRAPH)
_GRAPHS = (GRAPH, COMPILE_GRAPH)
_PREFILLS = 5
_WARM_UPS = 3

Step = Callable[[], None]


@dataclass(frozen=True)
class Times:
    """ms of one decoder, batch and mode.

    Attributes:
        tpot: time per output token: the mean over all tokens after the first.
        tpot_p10, tpot_p90: of single tokens.
        prefill: of the prompt up to its first output token; the median.
    """

    tpot: float
    tpot_p10: float
    tpot_p90: float
    prefill: float


class Decoding:
    """A batch of sequences of one decoder.

    Args:
        batch: sequences.
        input_tokens: length of the prompt, random tokens.
        output_tokens: tokens that follow, each the most likely one; at least 2.
    """

    def __init__(self, decoder: Decoder, batch: int, input_tokens: int, output_tokens: int, device: str) -> None:
        self.decoder = decoder
        self.device = device
        self.steps = output_tokens - 1
        generator = torch.Generator(device=device).manual_seed(batch)
        self.ids = torch.randint(decoder.config.vocab, (batch, input_tokens), device=device, generator=generator)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.cache: Any = decoder.cache(batch, input_tokens + max(output_tokens, _WARM_UPS + 1))

    def prefill(self) -> None:
        """The prompt, and its first output token."""
        self.token.copy_(self.decoder(self.ids, self.cache).argmax(-1, keepdim=True))

    def step(self) -> None:
        """One more output token of each sequence."""
        self.token.copy_(self.decoder(self.token, self.cache).argmax(-1, keepdim=True))

    def restart(self) -> None:
        """To the end of the prompt."""
        self.cache.reset()
        self.prefill()

    @torch.inference_mode()
    def measure(self, mode: str) -> Times:
        """Time prefill and decoding in a mode of :data:`MODES`.

        Raises:
            RuntimeError: what the model raises when it is run, compiled or captured.
        """
        self.decoder.use_compiled(False)
        self.restart()  # eager: a cache may be made by its first tokens, which no graph may do
        self.decoder.use_compiled(mode in _COMPILED)
        # A mode is what it says, or an error: not eager where compilations of new shapes have reached a limit.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            self.warm_up()
            prefill, step = self.prefill, self.step
            if mode in _GRAPHS:
                prefill, step = self._captured(self.prefill), self._captured(self.step)
            return self._time(prefill, step)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run what must not run for the first time in a capture or a measurement."""
        stream = torch.cuda.Stream() if self.device == "cuda" else None
        if stream:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.restart()
                for _ in range(_WARM_UPS):
                    self.step()
        if stream:
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()

    def _captured(self, run: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _time(self, prefill: Step, step: Step) -> Times:
        prefills = []
        for _ in range(_PREFILLS):
            self.cache.reset()
            prefills += self._laps(prefill, 1)
        laps = self._laps(step, self.steps)
        p10, p90 = np.percentile(laps, [10, 90])
        return Times(float(np.mean(laps)), float(p10), float(p90), float(np.median(prefills)))

    def _laps(self, run: Step, count: int) -> list[float]:
        """ms of each of ``count`` runs, one behind the other: the host's time counts where it is the longer one."""
        if self.device != "cuda":
            marks = [time.perf_counter()]
            for _ in range(count):
                run()
                marks.append(time.perf_counter())
            return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]
