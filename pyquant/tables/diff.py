"""What changed between two tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .table import Bucket, Entry, Table


@dataclass(frozen=True)
class Change:
    """One range of M of one weight where the tables differ; None: the table has no such entry."""

    entry: Entry  # the weight; its buckets do not matter
    range: str
    old: str | None
    new: str | None


def changes(old: Table, new: Table) -> Iterator[Change]:
    """Where the tables choose differently, in the order of encoding, dtype, group size, N, K and M."""
    of_old, of_new = ({entry.key: entry for entry in table.entries} for table in (old, new))
    for key in sorted(of_old.keys() | of_new.keys()):
        a, b = of_old.get(key), of_new.get(key)
        if a is None or b is None:
            for entry in (a, b):
                for bucket in entry.buckets if entry else ():
                    text = _text(bucket)
                    yield Change(entry, bucket.range, text if a else None, text if b else None)  # type: ignore[arg-type]
            continue
        yield from _of_entry(a, b)


def _of_entry(a: Entry, b: Entry) -> Iterator[Change]:
    starts = sorted({bucket.first for entry in (a, b) for bucket in entry.buckets})
    for first, after in zip(starts, [*starts[1:], None], strict=True):
        old, new = _text(a.at(first)), _text(b.at(first))
        if old != new:
            yield Change(a, f"{first}..{'' if after is None else after - 1}", old, new)


def _text(bucket: Bucket) -> str:
    return bucket.instance if bucket.gemm is None else f"{bucket.instance} (or {bucket.gemm})"
