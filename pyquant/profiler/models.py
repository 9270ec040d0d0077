"""The sizes of public models, from their published configs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder.

    Attributes:
        hidden: width of the residual stream.
        heads: outputs of the query projection.
        kv_heads: outputs of the key projection, and of the value projection.
        intermediate: width of the MLP.
        layers: number of blocks.
        vocab: number of tokens.
        head_dim: width of an attention head.
        gated: whether the MLP has a gate beside its up projection, as Llama's.
    """

    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    layers: int
    vocab: int
    head_dim: int = 128
    gated: bool = True

    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(N, K) of each weight, each once: projections on their own, as Hugging Face models have them, and those that
        share x joined, as inference servers do."""
        h, i = self.hidden, self.intermediate
        outputs = [self.heads, self.kv_heads, self.heads + 2 * self.kv_heads, i, *([2 * i] if self.gated else [])]
        return tuple(dict.fromkeys([*((n, h) for n in outputs), (h, self.heads), (h, i)]))


CONFIGS = {
    "llama-3.2-1b": Config(2048, 2048, 512, 8192, 16, 128256, head_dim=64),
    "llama-3.2-3b": Config(3072, 3072, 1024, 8192, 28, 128256),
    "llama-3.1-8b": Config(4096, 4096, 1024, 14336, 32, 128256),
    "llama-3.1-70b": Config(8192, 8192, 1024, 28672, 80, 128256),
    "qwen2.5-32b": Config(5120, 5120, 1024, 27648, 64, 152064),
    "qwen2.5-72b": Config(8192, 8192, 1024, 29568, 80, 152064),
    "phi-3-mini": Config(3072, 3072, 3072, 8192, 32, 32064, head_dim=96),
    "gpt-2": Config(768, 768, 768, 3072, 12, 50257, head_dim=64, gated=False),
    "llama-tiny": Config(128, 128, 64, 256, 2, 512, head_dim=32),  # for tests
}
