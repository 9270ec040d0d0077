"""The whole-model benchmark: every variant, batch and mode, with the same weights, tokens and model code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...profiler.models import Config
from .. import device as gpu_device
from ..environment import Environment
from ..gpu import BrokenDevice, Skip
from ..providers import Unavailable
from .accelerated import accelerate_decoder
from .decoder import Decoder
from .decoders import build
from .decoding import EAGER, GRAPH, Decoding, Times
from .memory import Memory
from .parts import PARTS, time_of_parts
from .rows import ModelRow
from .variants import BF16, Variant, linears_of, weight_bytes
from .verify import check_logits

# The modes whose kernels are those that the profiler sees; compiled ones are fused.
_PROFILED = (EAGER, GRAPH)
# Columns that a row without times leaves empty.
_FIGURES = ("tpot_ms", "tpot_p10_ms", "tpot_p90_ms", "prefill_ms", "tokens_per_s", "tpot_speedup", "prefill_speedup",
            *(f"{part}_ms" for part in PARTS), "gaps_ms", "linear_bytes", "weights_gb", "peak_gb", "accelerate_s",
            "accelerate_peak_gb", "error")  # fmt: skip


@dataclass(frozen=True)
class ModelPlan:
    """What to measure.

    Attributes:
        name: of the config.
        code: of :func:`~pyquant.bench.model.decoders.choose_code`.
        device: "cuda" or "cpu".
    """

    name: str
    config: Config
    code: str
    device: str
    variants: Sequence[Variant]
    batches: Sequence[int]
    modes: Sequence[str]
    input_tokens: int
    output_tokens: int
    verify: bool = True

    @property
    def cells(self) -> int:
        return len(self.variants) * len(self.batches) * len(self.modes)


_Baseline = dict[tuple[int, str], Times]  # of the bf16 decoder, by batch and mode


def measure_model(plan: ModelPlan, environment: Environment) -> Iterator[ModelRow | Skip]:
    """A row for each variant, batch and mode; a Skip for a variant that cannot take part.

    Raises:
        BrokenDevice: a kernel failed in a way after which the process cannot use the GPU; with the variants that were
            still to come.
    """
    baseline: _Baseline = {}
    # What others are compared with comes first.
    variants = sorted(plan.variants, key=lambda v: v.name != BF16)
    for i, variant in enumerate(variants):
        torch._dynamo.reset()
        try:
            # Only now is the decoder of the variant before gone.
            yield from _measure_variant(plan, environment, variant, Memory(plan.device), baseline)
        except BrokenDevice as error:
            rest = ",".join(v.name for v in variants[i + 1 :])
            raise BrokenDevice(f"{error}; not measured: {rest}" if rest else str(error)) from error


def _measure_variant(
    plan: ModelPlan, environment: Environment, variant: Variant, memory: Memory, baseline: _Baseline
) -> Iterator[ModelRow | Skip]:
    unknown: dict[str, Any] = dict.fromkeys(_FIGURES)
    row = ModelRow(
        model=plan.name,
        model_code=plan.code,
        layers=plan.config.layers,
        batch=0,
        input_tokens=plan.input_tokens,
        output_tokens=plan.output_tokens,
        variant=variant.label,
        mode="",
        check="",
        reason="",
        **unknown,
        **asdict(environment),
    )
    try:
        decoder = build(plan.code, plan.config, plan.device)
        with torch.no_grad():
            variant.apply(decoder)
        if variant.accelerated:
            cost = accelerate_decoder(decoder, set(linears_of(decoder)), plan.device, memory)
            row = replace(row, accelerate_s=cost.seconds, accelerate_peak_gb=cost.peak_gb)
        row = replace(row, linear_bytes=weight_bytes(decoder), weights_gb=memory.allocated())
    except Unavailable as error:
        yield Skip(variant.label, str(error), failed=False)
        return
    except Exception as error:  # whatever a library raises
        reason = _reason(plan, variant, error)
        yield from (replace(row, batch=b, mode=m, reason=reason) for b in plan.batches for m in plan.modes)
        return
    for batch in plan.batches:
        yield from _measure_batch(plan, replace(row, batch=batch), variant, decoder, memory, baseline)


def _measure_batch(
    plan: ModelPlan, row: ModelRow, variant: Variant, decoder: Decoder, memory: Memory, baseline: _Baseline
) -> Iterator[ModelRow | Skip]:
    try:
        if plan.verify and variant.ours:
            check, error = check_logits(decoder, row.batch, plan.device)
            row = replace(row, check=check, error=error)
        decoding = Decoding(decoder, row.batch, plan.input_tokens, plan.output_tokens, plan.device)
        decoding.warm_up()
    except Exception as error:
        reason = _reason(plan, variant, error)
        yield from (replace(row, mode=mode, reason=reason) for mode in plan.modes)
        return
    try:
        parts = time_of_parts(decoding)
    except Exception as error:  # of another library's layers, too
        parts = {}
        yield Skip(f"{variant.label}, parts of a token", _reason(plan, variant, error), failed=False)
    for mode in plan.modes:
        try:
            memory.start_peak()
            times = decoding.measure(mode)
            measured = replace(row, mode=mode, peak_gb=memory.peak())
        except Exception as error:  # of compilers, too
            yield replace(row, mode=mode, reason=_reason(plan, variant, error))
            continue
        yield _with_times(plan, measured, times, parts if mode in _PROFILED else {}, baseline)


def _with_times(plan: ModelPlan, row: ModelRow, times: Times, parts: dict[str, float], baseline: _Baseline) -> ModelRow:
    key = row.batch, row.mode
    if row.variant == BF16:
        baseline[key] = times
    base = baseline.get(key)
    figures = {f"{part}_ms": round(ms, 4) for part, ms in parts.items()}
    gaps = times.tpot - sum(parts.values()) if parts and plan.device == "cuda" else None
    return replace(
        row,
        tpot_ms=round(times.tpot, 4),
        tpot_p10_ms=round(times.tpot_p10, 4),
        tpot_p90_ms=round(times.tpot_p90, 4),
        prefill_ms=round(times.prefill, 3),
        tokens_per_s=round(row.batch * 1e3 / times.tpot, 1),
        tpot_speedup=None if base is None else round(base.tpot / times.tpot, 3),
        prefill_speedup=None if base is None else round(base.prefill / times.prefill, 3),
        # Kernels under the profiler, and not one behind the other, may take longer than all of the token.
        gaps_ms=round(gaps, 4) if gaps is not None and gaps >= 0 else None,
        **figures,  # type: ignore[arg-type]
    )


def _reason(plan: ModelPlan, variant: Variant, error: Exception) -> str:
    """The error's first line.

    Raises:
        BrokenDevice: when the GPU does not answer any more.
    """
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
    if plan.device == "cuda":
        try:
            gpu_device.synchronize()
        except RuntimeError as broken:
            raise BrokenDevice(f"{variant.label}: {reason}; after it the GPU reports: {broken}") from error
    return reason
