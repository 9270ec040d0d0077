"""Where a token's time goes, by torch.profiler on steps that run eagerly."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
_RANGE = "pyquant part: "
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
            decoding.step()
        if on_gpu:
            torch.cuda.synchronize()
    sums, all_kernels = dict.fromkeys(PARTS, 0.0), 0.0
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            sums[_part_of(event)] += _own_us(event, on_gpu) / _STEPS / 1e3
        elif not event.name.startswith(_RANGE):
            all_kernels += event.time_range.elapsed_us() / _STEPS / 1e3
    if (on_gpu and not math.isclose(sum(sums.values()), all_kernels, rel_tol=_LOST)) or not sum(sums.values()):
        raise RuntimeError(
            f"torch.profiler saw kernels of {all_kernels:.3f} ms a token, of which it says who launched "
            f"{sum(sums.values()):.3f} ms"
        )
    return sums


def _own_us(event: Any, on_gpu: bool) -> float:
    if not on_gpu:
        return event.self_cpu_time_total
    # A range has a mark of its own on the GPU's time line, which is no kernel.
    return sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(_RANGE))


def _part_of(event: Any) -> str:
    attention = False
    while event is not None:
        if event.name.startswith(_RANGE):
            return event.name.removeprefix(_RANGE)
        attention = attention or any(word in event.name for word in _ATTENTION)
        event = event.cpu_parent
    return ATTENTION if attention else ELEMENTWISE


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
