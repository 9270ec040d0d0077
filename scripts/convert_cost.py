"""What `pyquant convert` costs on a nested nf4 checkpoint of Llama-3.1-8B's shape, against a copy of its bytes.

python scripts/convert_cost.py              writes 5.7 GB twice into a temporary folder, and removes them
python scripts/convert_cost.py --layers 4   a model of fewer layers

The copy reads 16 MB at a time, writes them, and calls fsync for each shard, as the conversion does. Both are
processes' whole times, with the input in the page cache (warm) or dropped from it (cold). Memory is the largest
resident set, mapped files included. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pyquant.formats import FORMATS, NESTED_BLOCK, NESTED_MAP_SIZE

HIDDEN, KV, FFN, VOCABULARY = 4096, 1024, 14336, 128256
# name: (N, K)
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}
BLOCK = 64
RNG = np.random.default_rng(0)


def random(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Random bytes; floats are normal, times 0.02."""
    if dtype is torch.uint8:
        return torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))
    return torch.from_numpy(RNG.standard_normal(shape, dtype=np.float32)).mul_(0.02).to(dtype)


def linear(name: str, n: int, k: int) -> dict[str, torch.Tensor]:
    """A Linear4bit as bitsandbytes stores it."""
    state = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": [n, k],
        "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.05,
    }  # fmt: skip
    blocks = n * k // BLOCK
    return {
        f"{name}.weight": random(n * k // 2, 1),
        f"{name}.weight.absmax": random(blocks),
        f"{name}.weight.quant_map": torch.tensor(FORMATS["nf4"].codebook),
        f"{name}.weight.nested_absmax": random(-(-blocks // NESTED_BLOCK), dtype=torch.float32).abs(),
        f"{name}.weight.nested_quant_map": torch.linspace(-1, 1, NESTED_MAP_SIZE),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }


def entries(layers: int) -> Iterator[dict[str, torch.Tensor]]:
    """The modules in the order in which transformers saves them."""
    yield {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN, dtype=torch.bfloat16)}
    for i in range(layers):
        for name, (n, k) in LINEARS.items():
            yield linear(f"model.layers.{i}.{name}", n, k)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield {f"model.layers.{i}.{norm}.weight": random(HIDDEN, dtype=torch.bfloat16)}
    yield {"model.norm.weight": random(HIDDEN, dtype=torch.bfloat16)}
    yield {"lm_head.weight": random(VOCABULARY, HIDDEN, dtype=torch.bfloat16)}


def write_checkpoint(folder: Path, layers: int, shards: int) -> None:
    """The two matrices of the vocabulary are a shard each, since they are larger than any other; the rest is dealt
    out evenly."""
    folder.mkdir()
    layer_bytes = sum(n * k for n, k in LINEARS.values()) * (1 / 2 + 1 / BLOCK)
    limit = layers * layer_bytes / (shards - 2)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05}-of-{shards:05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    written = 0.0
    for entry in entries(layers):
        size = sum(t.nbytes for t in entry.values())
        if shard and size > limit:
            flush()
        shard |= entry
        written = sum(t.nbytes for t in shard.values())
        if written >= 0.98 * limit:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (folder / "config.json").write_text(json.dumps(config))


# Run as a process of its own, without torch.
COPY = """
import os, sys
from pathlib import Path
source, target = map(Path, sys.argv[1:])
target.mkdir()
buffer = memoryview(bytearray(1 << 24))
for file in sorted(source.iterdir()):
    with open(file, "rb", buffering=0) as data, open(target / file.name, "wb", buffering=0) as out:
        while count := data.readinto(buffer):
            out.write(buffer[:count])
        os.fsync(out.fileno())
"""


def prepare(folder: Path, cold: bool) -> None:
    """Bring the files into the page cache, or drop them from it; nothing else is left to be written to the disk."""
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb") as stream:
            if cold:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while stream.read(1 << 24):
                    pass


def measure(command: list[str]) -> tuple[float, int]:
    """Seconds, and the largest resident set in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        # Not ru_maxrss, which counts this process before exec too.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    if process.returncode != 0:
        raise RuntimeError(f"{command}: exit status {process.returncode}")
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--runs", type=int, default=2, help="of each; the fastest counts")
    parser.add_argument("--folder", type=Path, help="where to write; the folder for temporary files unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        source, target = Path(temporary, "in"), Path(temporary, "out")
        write_checkpoint(source, options.layers, options.shards)
        sizes = sorted(file.stat().st_size for file in source.glob("*.safetensors"))
        print(f"{len(sizes)} shards, {sum(sizes) / 1e9:.2f} GB, the largest {sizes[-1] / 1e9:.2f} GB")
        commands = {
            "copy": [sys.executable, "-c", COPY, source, target],
            "pyquant convert": [sys.executable, "-m", "pyquant", "convert", source, target],
        }
        for state in ("warm", "cold"):
            best: dict[str, tuple[float, int]] = {}
            for _ in range(options.runs):
                for name, command in commands.items():
                    prepare(source, cold=state == "cold")
                    result = measure([str(part) for part in command])
                    shutil.rmtree(target)
                    best[name] = min(best.get(name, result), result)
            for name, (seconds, peak) in best.items():
                ratio, shards = seconds / best["copy"][0], peak / (sum(sizes) / len(sizes))
                print(
                    f"{state}  {name:16} {seconds:6.1f} s  {ratio:.2f} x  {peak / 1e9:.2f} GB, {shards:.2f} mean shards"
                )


if __name__ == "__main__":
    main()
