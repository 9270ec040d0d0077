"""Golden files of tests/data/load, and tensors packed by references written from the producers' documents."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent / "data" / "load"


@dataclass(frozen=True)
class Golden:
    """One case of a golden file."""

    producer: str
    name: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]  # of the whole file's cases
    expected: dict[torch.dtype, torch.Tensor]

    def __str__(self) -> str:
        return f"{self.producer}-{self.name}"

    def arguments(self, *names: str) -> dict[str, Any]:
        """Those of the loader, taken from the settings."""
        return {name: self.settings[name] for name in names if name in self.settings}


def golden(producer: str) -> list[Golden]:
    """All cases of a producer."""
    with safe_open(FOLDER / f"{producer}.safetensors", "pt") as file:
        everything = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cases = json.loads(file.metadata()["cases"])
    stored = {name: t for name, t in everything.items() if not name.startswith("expected.")}
    found = []
    for name, settings in cases.items():
        prefix = f"expected.{name}."
        expected = {
            t.dtype: t for key, t in everything.items() if key.startswith(prefix) and "." not in key[len(prefix) :]
        }
        found.append(Golden(producer, name, settings, stored, expected))
    assert found
    return found


def little_endian_words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Codes [R, C] as one stream of bits per row, lowest bit first, in int32 words [R, ceil(C * bits / 32)]."""
    rows, count = codes.shape
    stream = (codes[:, :, None] >> np.arange(bits)) & 1
    padded = np.zeros((rows, -(-count * bits // 32) * 32), dtype=np.uint8)
    padded[:, : count * bits] = stream.reshape(rows, -1)
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


def gptq_tensors(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int, stored_offset: int
) -> dict[str, torch.Tensor]:
    """codes [N, K], zeros and scales [N, groups] as a GPTQ layer called ``p``; zeros are stored less the offset."""
    return {
        "p.qweight": little_endian_words(codes, bits).t().contiguous(),
        "p.qzeros": little_endian_words(zeros.T - stored_offset, bits),
        "p.scales": torch.from_numpy(scales.T.copy()).half(),
        "p.g_idx": torch.from_numpy(g_idx).int(),
    }


def awq_words(codes: np.ndarray) -> torch.Tensor:
    """codes [R, N] -> int32 [R, N / 8], nibble j holding column [0, 2, 4, 6, 1, 3, 5, 7][j]."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return little_endian_words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 4)


def tinygemm_words(codes: np.ndarray, tiles: int) -> torch.Tensor:
    """codes [N, K] -> int32 [N / 8, K / (16 tiles), 32, tiles / 2], word by word as tinygemm's kernel reads them."""
    n, k = codes.shape
    out = np.zeros((n // 8, k // (16 * tiles), 32, tiles // 2), dtype=np.int64)
    for tile, block, lane, word in np.ndindex(*out.shape):
        row = codes[8 * tile + lane // 4]
        first = (block * tiles + 2 * word) * 8 + lane % 4  # a byte holds an even k and the next one
        at = [2 * (first + 4 * i) for i in range(4)]
        nibbles = [row[i] for i in at] + [row[i + 1] for i in at]
        out[tile, block, lane, word] = sum(int(v) << (4 * i) for i, v in enumerate(nibbles))
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))
