"""Whether a table fits this library and the figures of a CSV."""

from __future__ import annotations

from collections.abc import Iterator

from .. import _library
from .lookup import Lookup
from .measurements import Measurements, is_dense
from .score import cells
from .table import Table


def problems_of(table: Table, measurements: Measurements | None = None, tolerance: float = 0.05) -> Iterator[str]:
    """What is wrong with a table whose form is right, a line each; nothing: all is well.

    Args:
        table: as :func:`~pyquant.tables.read_table` gives it, so buckets cover every M.
        measurements: figures that the table must not be slower than.
        tolerance: a choice this fraction slower than the best measured instance is a regression.
    """
    known = set(_library.all_instance_names())
    for i, entry in enumerate(table.entries):
        for j, bucket in enumerate(entry.buckets):
            where = f"entries[{i}].buckets[{j}]"
            for field, name in (("instance", bucket.instance), ("gemm", bucket.gemm)):
                if name is not None and name not in known:
                    yield f"{where}.{field}: no instance is called {name}"
            if bucket.gemm is not None and is_dense(bucket.gemm):
                yield f"{where}.gemm: expected a GEMM, got {bucket.gemm}"
    if measurements is None:
        return
    if measurements.device != table.device:
        yield f"device: the table is for {table.device}, the CSV of {measurements.device}"
        return
    if not set(table.instances) <= known:
        return
    for cell in cells(Lookup(table), measurements):
        where = f"{cell.where}, M={cell.m}"
        if cell.choice is None:
            yield f"{where}: the table says nothing"
        elif cell.us is None:
            yield f"{where}: {cell.choice} was not measured"
        elif cell.loss > tolerance:
            yield f"{where}: {cell.choice} takes {cell.us:.2f} us, {cell.best} {cell.best_us:.2f} us"
