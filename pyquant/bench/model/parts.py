"""Where a token's time goes, by torch.profiler on steps that run eagerly."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from .decoder import Decoder
from .decoding import Decoding
from .variants import linears_of

LINEAR, LM_HEAD, ATTENTION, ELEMENTWISE = "linear", "lm_head", "attention", "elementwise"
PARTS = (LINEAR, LM_HEAD, ATTENTION, ELEMENTWISE)
_RANGE = "pyquant range: "
_STEP = f"{_RANGE}step"
# Attention is no module of its own, since rotary embeddings are in the same one: it is known by its operators.
_ATTENTION = ("scaled_dot_product", "index_copy")
_STEPS = 3
_LOST = 0.02  # of the kernels' time may be nobody's


@torch.inference_mode()
def time_of_parts(decoding: Decoding) -> dict[str, float]:
    """ms of a token in each of :data:`PARTS`: on a GPU the time of kernels, on the CPU that of operators.

    ``attention`` has the key and value cache; ``elementwise`` all that is no linear layer and no attention: norms,
    rotary embeddings, activations, residuals, the embedding, argmax.

    Raises:
        RuntimeError: on a GPU whose kernels the profiler does not see, or not who launched them.
    """
    on_gpu = decoding.device == "cuda"
    decoding.decoder.use_compiled(False)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    decoding.restart()
    with _ranges(decoding.decoder), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(_STEPS):
            with record_function(_STEP):
                decoding.step()
        if on_gpu:
            torch.cuda.synchronize()
    if on_gpu:
        return parts_of_kernels(profiler.events())
    sums = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        if event.name != _STEP:
            sums[_part_of_operator(event)] += _own_us(event) / _STEPS / 1e3
    return sums


def parts_of_kernels(events: Iterable[Any]) -> dict[str, float]:
    """ms of a step's kernels in each of :data:`PARTS`: the median over the steps.

    A kernel belongs to the range that was open on the host when it was launched. Its launch is found by the id that
    CUDA gives both: ``FunctionEvent.kernels`` also goes by the ids of operators, which overlap CUDA's, and counts
    kernels twice (pytorch pull request 196282). Of kernels that overlap, the later one counts from the end of the
    earlier one, so no instant counts twice.

    Args:
        events: of a profiler that saw the ranges of :func:`time_of_parts`; ``id``, ``name``, ``device_type`` and
            ``time_range`` (us) of each are read.

    Raises:
        RuntimeError: there are no kernels, or too many of which it is not known who launched them.
    """
    host = [e for e in events if e.device_type == DeviceType.CPU]
    # A range also has a mark on the GPU's time line, which is no kernel.
    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.name.startswith(_RANGE)]
    # cudaLaunchKernel, cuLaunchKernelEx, cudaMemcpyAsync and the like; operators are called aten::mm.
    launches = {e.id: e.time_range.start for e in host if e.name.startswith("cu")}
    steps = sorted((e.time_range for e in host if e.name == _STEP), key=lambda step: step.start)
    ranges = [(e.time_range, part) for e in host if (part := _part_of_name(e.name))]
    sums = [dict.fromkeys(PARTS, 0.0) for _ in steps]
    busy_until = all_us = lost_us = 0.0
    for kernel in sorted(kernels, key=lambda e: e.time_range.start):
        us = max(0.0, kernel.time_range.end - max(kernel.time_range.start, busy_until))
        busy_until = max(busy_until, kernel.time_range.end)
        all_us += us
        launch = launches.get(kernel.id)
        step = next((i for i, s in enumerate(steps) if launch is not None and s.start <= launch <= s.end), None)
        if launch is None or step is None:
            lost_us += us
            continue
        part = next((part for span, part in ranges if span.start <= launch <= span.end), ELEMENTWISE)
        sums[step][part] += us / 1e3
    if not all_us or lost_us > _LOST * all_us:
        raise RuntimeError(
            f"torch.profiler saw kernels of {all_us / 1e3:.3f} ms in {len(steps)} tokens, of which it does not say who "
            f"launched {lost_us / 1e3:.3f} ms"
        )
    return {part: statistics.median(step[part] for step in sums) for part in PARTS}


def _own_us(event: Any) -> float:
    return event.self_cpu_time_total


def _part_of_operator(event: Any) -> str:
    while event is not None:
        if part := _part_of_name(event.name):
            return part
        event = event.cpu_parent
    return ELEMENTWISE


def _part_of_name(name: str) -> str | None:
    """The part of a range, or of an operator that says it; None: of any other."""
    if name.startswith(_RANGE):
        part = name.removeprefix(_RANGE)
        return part if part in PARTS else None
    return ATTENTION if any(word in name for word in _ATTENTION) else None


@contextmanager
def _ranges(decoder: Decoder) -> Iterator[None]:
    """Linear layers and lm_head run in ranges of the profiler."""
    modules = dict.fromkeys(linears_of(decoder).values(), LINEAR) | {decoder.head(): LM_HEAD}
    with ExitStack() as stack:
        for module, part in modules.items():
            opened: list[record_function] = []

            def before(_: nn.Module, __: Any, part: str = part, opened: list[record_function] = opened) -> None:
                opened.append(record_function(_RANGE + part))
                opened[-1].__enter__()

            def after(_: nn.Module, __: Any, ___: Any, opened: list[record_function] = opened) -> None:
                opened.pop().__exit__(None, None, None)

            for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after)):
                stack.callback(handle.remove)
        yield
