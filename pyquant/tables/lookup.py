"""The library's own lookup, for a table that is not in use."""

from __future__ import annotations

import itertools
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from .. import _library
from .table import Bucket, Table

_DTYPE_IDS = {"fp32": 0, "fp16": 1, "bf16": 2}  # cx_dtype
_NUMBER = itertools.count()


@dataclass(frozen=True)
class Choice:
    """What a table says of one call: the bucket, and the weight that it is about.

    Attributes:
        group_size: 0: one group per row.
        predicted: by the table's cost model, for the weight that was asked for; else it was measured, for the nearest.
    """

    bucket: Bucket
    group_size: int
    n: int
    k: int
    predicted: bool


class Lookup:
    """Questions to one table, answered as the dispatch would.

    Args:
        table: loaded under a device name that no device has, so that the tables in use stay; None: the tables in use.
        device: whose table, without ``table``.
        processors: SMs of a GPU without a table of its own, for which a cost model predicts; 0: it does not.
    """

    def __init__(self, table: Table | None = None, device: str = "", processors: int = 0) -> None:
        self._device = device
        self._processors = processors
        if table is None:
            return
        self._device = f"{table.device} #{os.getpid()}.{next(_NUMBER)}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "table.json"
            path.write_text(replace(table, device=self._device).to_json(), encoding="utf-8")
            _library.load_table(path)

    def find(self, encoding: str, dtype: str, group_size: int, n: int, k: int, m: int) -> Choice | None:
        """What runs for M = ``m``; ``group_size`` 0: one group per row. None: the table says nothing."""
        key = (encoding, _DTYPE_IDS[dtype], group_size or k, n, k)
        found = _library.find_in_table(self._device, *key, max(m, 1), self._processors)
        if found is None:
            return None
        gemm = None if found["gemm"] == found["instance"] else found["gemm"]
        bucket = Bucket(found["m_first"], found["m_last"], found["instance"], gemm)
        return Choice(bucket, found["group_size"], found["n"], found["k"], found["predicted"])
