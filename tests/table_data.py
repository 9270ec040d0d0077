"""Tables and measured rows for the tests of dispatch tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import pyquant
from pyquant.tables import Bucket, Entry, Table

STREAM, TILE, DEQUANT = "cpu_stream_portable", "cpu_tile_portable", "cpu_dequant_portable"
DEVICE = "Test GPU"


def bucket(first: int, last: int | None, instance: str, gemm: str | None = None) -> Bucket:
    return Bucket(first, last, instance, gemm)


def entry(n: int = 4096, k: int = 4096, *buckets: Bucket, **key: Any) -> Entry:
    fields = {"encoding": "int4", "dtype": "bf16", "group_size": 128, **key}
    return Entry(n=n, k=k, buckets=buckets or (bucket(1, None, STREAM),), **fields)


def table(*entries: Entry, device: str = DEVICE, processors: int | None = 132) -> Table:
    return Table(device, processors, entries, {"margin": 0.02})


def row(m: int, instance: str, us: float, n: int = 4096, k: int = 4096, **cells: Any) -> dict[str, Any]:
    """A row of a CSV of ``pyquant profile``, as far as tables look at it."""
    return {
        "m": m,
        "n": n,
        "k": k,
        "format": "int4-g128",
        "group_size": 128,
        "dtype": "bf16",
        "provider": "pyquant instance",
        "instance": instance,
        "us": us,
        "disposition": "passed",
        "gpu": DEVICE,
        "driver": "1.2",
        **cells,
    }


def damage(path: Path, good: str, old: str, new: str) -> Path:
    """A table's JSON in which ``old`` was replaced once."""
    assert old in good
    path.write_text(good.replace(old, new, 1))
    return path


def error_of_loading(path: Path, words: str) -> str:
    """The message with which the library refuses a file: its line, and ``words``."""
    with pytest.raises(ValueError, match=rf"load_table: .*{re.escape(path.name)}: line \d+: ") as error:
        pyquant.load_table(path)
    assert words in str(error.value)
    return str(error.value)


def write_csv(path: Path, *rows: dict[str, Any]) -> Path:
    pd.DataFrame(rows).to_csv(path, index=False)
    return path
