"""One case after the other: the time, the check and the row. How times are taken is pyquant.bench's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from .. import _library, ops
from ..bench import device as gpu_device
from ..bench.cpu import COLD_BYTES, time_calls
from ..bench.environment import Environment, read_cpu_environment, read_environment
from ..bench.gpu import COLD_L2S, BrokenDevice, check_outputs, cold_calls
from ..bench.graph_timing import Timing, cold_copies, time_graph, time_stream
from ..bench.problem import DTYPES
from ..bench.providers import Floor, Operand, Source, Unavailable
from ..bench.rows import INSTANCE_PROVIDER
from ..weight import PackedWeight
from .plan import Case, Setting
from .rows import FAILED, NOT_SUPPORTED, NOT_VERIFIED, ProfileRow

# How messages of the operator begin where an instance does not cover a problem.
_REFUSAL = "gemm: instance:"

# Columns that a case without a time leaves empty.
_FIGURES = ("group_size", "us", "us_p10", "us_p90", "copies", "weight_bytes", "gb_per_s", "tflops", "floor_us",
            "floor_fraction", "ratio_to_cublas", "error")  # fmt: skip

Call = Callable[[PackedWeight, torch.Tensor], torch.Tensor]


class Profiler:
    """Measures cases on one device. Weights are kept from one case to the next of the same shape and format."""

    cpu_seconds: ClassVar[float] = 0.2  # of calls, for each case on the CPU

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.dtype = DTYPES[setting.dtype]
        self.on_gpu = setting.device == "cuda"
        self.processors = torch.get_num_threads()
        cold_bytes = COLD_BYTES
        if self.on_gpu:
            self.processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
            cold_bytes = COLD_L2S * gpu_device.l2_bytes()
        self.cold_bytes = cold_bytes if setting.cache == "cold" else 0
        self.floor = Floor(self.cold_bytes) if self.on_gpu else None
        self._weights: tuple[Any, Any] = (None, None)
        self._cublas_us: dict[tuple[int, int, int], float | None] = {}

    @functools.cached_property
    def environment(self) -> Environment:
        """Of all rows of this run."""
        return read_environment() if self.on_gpu else read_cpu_environment(self.device_name)

    @property
    def device_name(self) -> str:
        """The column ``gpu``."""
        return _library.device_name(self.setting.device) or self.setting.device

    def measure(self, cases: Iterable[Case]) -> Iterator[ProfileRow]:
        """A row for each case.

        Raises:
            BrokenDevice: a kernel failed in a way after which the process cannot use the GPU.
        """
        _ = self.environment  # while the device is whole
        for case in cases:
            try:
                row = self._measure(case)
            except Unavailable as error:
                row = self._row(case, NOT_SUPPORTED, str(error))
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                broken = self._device_error()
                if broken:
                    # The row comes first, so that going on with the file leaves this case out.
                    yield self._row(case, FAILED, reason)
                    raise BrokenDevice(f"{case.instance}: {reason}; after it the GPU reports: {broken}") from error
                row = self._row(case, NOT_SUPPORTED if reason.startswith(_REFUSAL) else FAILED, reason)
            yield row

    def _device_error(self) -> str:
        """What the GPU reports if it does not answer any more, else ""."""
        if not self.on_gpu:
            return ""
        try:
            gpu_device.synchronize()
        except RuntimeError as error:
            return str(error).strip().split("\n")[0]
        return ""

    def _measure(self, case: Case) -> ProfileRow:
        packed, reference, copies = self._weight(case)
        with torch.inference_mode():
            return self._measure_on(case, packed, reference, copies)

    def _measure_on(
        self, case: Case, packed: PackedWeight, reference: torch.Tensor, copies: Sequence[PackedWeight]
    ) -> ProfileRow:
        generator = torch.Generator(device=self.setting.device).manual_seed(case.m)
        x = torch.randn(case.m, case.k, device=self.setting.device, generator=generator).to(self.dtype)
        bias = None
        if self.setting.bias:
            bias = torch.randn(case.n, device=self.setting.device, generator=generator).to(self.dtype)
        call = _call_of(case, bias)
        call(packed, x)  # what the instance does not cover fails here, before anything is timed
        calls = [functools.partial(call, weight) for weight in copies]
        timing = self._time(calls, x, case.n)
        disposition, error = NOT_VERIFIED, None
        if self.setting.verify:
            disposition, error = check_outputs(True, x, reference, timing.outputs, bias)
        us = timing.us
        floor_us = self._floor(packed.nbytes)
        cublas_us = self._cublas(case, x, reference)
        return self._row(
            case,
            disposition,
            group_size=packed.group_size,
            us=round(us, 3),
            us_p10=round(timing.us_p10, 3),
            us_p90=round(timing.us_p90, 3),
            copies=len(copies),
            weight_bytes=packed.nbytes,
            gb_per_s=round(packed.nbytes / us / 1e3, 1),
            tflops=round(2 * case.m * case.n * case.k / us / 1e6, 3),
            floor_us=None if floor_us is None else round(floor_us, 3),
            floor_fraction=None if floor_us is None else round(floor_us / us, 4),
            ratio_to_cublas=None if cublas_us is None else round(cublas_us / us, 4),
            error=error,
        )

    def _weight(self, case: Case) -> tuple[PackedWeight, torch.Tensor, list[PackedWeight]]:
        """The packed weight, what it stands for in fp32, and its copies.

        Raises:
            Unavailable: the shape does not allow the format, or the copies do not fit in memory.
        """
        key = (case.n, case.k, case.spec)
        if self._weights[0] != key:
            self._weights = (None, None)  # before the next ones are made
            if self.on_gpu:
                gpu_device.release()
            source = Source(case.n, case.k, self.dtype, self.setting.device)
            packed = source.packed(case.spec)
            copies = self._copies(packed)
            self._weights = key, (packed, source.dequantized(case.spec), copies)
        return self._weights[1]

    def _copies(self, packed: PackedWeight) -> list[PackedWeight]:
        if not self.on_gpu:
            count = cold_copies(packed.nbytes, self.cold_bytes)
            return [packed, *(packed.map_tensors(torch.clone) for _ in range(count - 1))]
        # The calls of the benchmark's operand hand their weight back.
        operand = Operand(packed, lambda weight, x: weight, packed.nbytes, "")
        empty = torch.empty(0)
        return [call(empty) for call in cold_calls(operand, self.cold_bytes)]

    def _time(self, calls: Sequence[Callable[[torch.Tensor], Any]], x: torch.Tensor, n: int) -> Timing:
        if not self.on_gpu:
            us = np.array(time_calls(calls, x, self.cpu_seconds)) * 1e6
            p10, median, p90 = (float(v) for v in np.percentile(us, [10, 50, 90]))
            return Timing(median, p10, p90, [calls[0](x)])
        if self.setting.launch == "stream":
            return time_stream(calls, x)
        return time_graph(calls, x, x.shape[0] * n * x.element_size())

    def _floor(self, nbytes: int) -> float | None:
        """us of only reading ``nbytes``; None on the CPU, or where it cannot be measured."""
        if self.floor is None:
            return None
        try:
            return self.floor.us(nbytes)
        except Unavailable:
            return None

    def _cublas(self, case: Case, x: torch.Tensor, reference: torch.Tensor) -> float | None:
        """us of F.linear on the dequantized weight, once for each problem; None on the CPU, or without the memory."""
        if not self.on_gpu:
            return None
        key = (case.m, case.n, case.k)
        if key not in self._cublas_us:
            dense = reference.to(self.dtype)
            operand = Operand(dense, lambda weight, x: F.linear(x, weight), dense.nbytes, "")
            try:
                self._cublas_us[key] = self._time(cold_calls(operand, self.cold_bytes), x, case.n).us
            except Unavailable:
                self._cublas_us[key] = None
        return self._cublas_us[key]

    def _row(self, case: Case, disposition: str, reason: str = "", **figures: Any) -> ProfileRow:
        s = self.setting
        values: dict[str, Any] = dict.fromkeys(_FIGURES)
        values |= figures
        values |= {**asdict(self.environment), "command": case.command(s)}
        return ProfileRow(
            m=case.m,
            n=case.n,
            k=case.k,
            format=str(case.spec),
            dtype=s.dtype,
            bias=s.bias,
            cache=s.cache,
            launch=s.launch,
            provider=INSTANCE_PROVIDER,
            instance=case.instance,
            disposition=disposition,
            reason=reason,
            processors=self.processors,
            **values,
        )


def _call_of(case: Case, bias: torch.Tensor | None) -> Call:
    """A call of the case's instance, with a dense GEMM behind it if it dequantizes."""
    if not case.is_gemm:
        return lambda weight, x: F.linear(x, ops.dequantize(weight, x.dtype), bias)

    def run(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
        tensors, integers = ops.op_arguments(weight)
        return torch.ops.pyquant.gemm_instance(x, *tensors, bias, *integers, case.index)

    return run
