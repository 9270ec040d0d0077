"""The rows of a whole-model benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from ..environment import Environment


@dataclass(frozen=True)
class _Figures:
    """The columns of a row without those of its run."""

    model: str
    model_code: str  # transformers and its version; plain: pyquant's own code, with joined projections
    layers: int
    batch: int  # sequences
    input_tokens: int  # of each sequence: the prompt
    output_tokens: int
    variant: str  # whose linear layers
    mode: str  # eager, graph, compile, compile-graph
    tpot_ms: float | None  # time per output token after the first: the mean
    tpot_p10_ms: float | None
    tpot_p90_ms: float | None
    prefill_ms: float | None  # prompt to first token
    tokens_per_s: float | None  # of all sequences, while decoding
    tpot_speedup: float | None  # over bf16 in the same mode; 2: half the time
    prefill_speedup: float | None
    linear_ms: float | None  # of a token's kernels, run eagerly; the modes that compile have others
    lm_head_ms: float | None
    attention_ms: float | None
    elementwise_ms: float | None  # norms, rotary embeddings, activations, residuals, embedding, argmax
    gaps_ms: float | None  # tpot_ms less the four, if that is above 0: time without a kernel; GPU only
    linear_bytes: int | None  # of weights that the linear layers read for a token
    weights_gb: float | None  # 1e9 bytes on the GPU when the decoder stands; GPU only, as all memory
    peak_gb: float | None  # the most while this row was measured
    accelerate_s: float | None  # of pyquant.accelerate
    accelerate_peak_gb: float | None  # the most during it
    check: str  # passed or incorrect: the logits against the dequantized model's; "": not compared
    error: float | None
    reason: str  # why there are no times


@dataclass(frozen=True)
class ModelRow(Environment, _Figures):
    """One variant, batch and mode; the fields are the CSV's columns, None and "" its empty cells."""
