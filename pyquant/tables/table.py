"""The table: entries of (encoding, dtype, group size, N, K), each with buckets of M; and its JSON file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schema import FAMILIES, SCHEMA_VERSION, validate


@dataclass(frozen=True)
class Bucket:
    """A range of M and what runs there.

    Attributes:
        first, last: both belong to the range; ``last`` is None in an entry's last bucket, which has no end.
        instance: name of a kernel instance.
        gemm: the GEMM instance for callers without a dense GEMM of their own, where ``instance`` only dequantizes;
            None: ``instance`` itself, or if that dequantizes, whatever the rule of the dispatch takes.
    """

    first: int
    last: int | None
    instance: str
    gemm: str | None = None

    @property
    def range(self) -> str:
        """``1..16``, or ``17..`` without an end."""
        return f"{self.first}..{'' if self.last is None else self.last}"


@dataclass(frozen=True)
class Entry:
    """The buckets of one weight shape. ``group_size`` 0 stands for one group per row (group size K)."""

    encoding: str
    dtype: str
    group_size: int
    n: int
    k: int
    buckets: tuple[Bucket, ...]

    @property
    def key(self) -> tuple[str, str, int, int, int]:
        return self.encoding, self.dtype, self.group_size, self.n, self.k

    def at(self, m: int) -> Bucket:
        """The bucket of ``m`` >= 1."""
        return next(b for b in self.buckets if b.last is None or m <= b.last)

    def __str__(self) -> str:
        group = f"g{self.group_size or 'K'}"
        return f"{self.encoding}, {self.dtype}, {group}, {self.n} x {self.k}"


@dataclass(frozen=True)
class CostModel:
    """What GEMMs with weights of one encoding take, as closed forms (cutlass_ext/cost_model.hpp).

    Attributes:
        encoding: of :data:`~pyquant.tables.schema.ENCODINGS`; it stands for all 4-bit weights of its kind.
        coefficients: of each of :data:`~pyquant.tables.schema.FAMILIES`.
    """

    encoding: str
    coefficients: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Table:
    """What was measured on one device.

    Attributes:
        device: the GPU's name as CUDA reports it, or the CPU's model name.
        processors: its SMs; None if the measurement does not say, and waves then do not count in distances.
        provenance: GPU, driver, clocks, versions, commit, date, files, margin: whatever explains the figures.
        models: for weights that are in no entry.
    """

    device: str
    processors: int | None
    entries: tuple[Entry, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[CostModel, ...] = ()

    @property
    def instances(self) -> list[str]:
        """Every instance that is named, sorted."""
        buckets = [b for entry in self.entries for b in entry.buckets]
        return sorted({b.instance for b in buckets} | {b.gemm for b in buckets if b.gemm})

    def to_json(self) -> str:
        """One line for each entry, so that a diff and an error's line number say which."""
        head = {
            "schema": SCHEMA_VERSION,
            "device": self.device,
            "processors": self.processors,
            "provenance": dict(self.provenance),
        }
        text = json.dumps(head, indent=2, ensure_ascii=False)[:-2]
        if self.models:
            text += _lines("models", [{"encoding": m.encoding, **m.coefficients} for m in self.models])
        return text + _lines("entries", [_entry_json(entry) for entry in self.entries]) + "\n}\n"


def _lines(name: str, values: Sequence[Any]) -> str:
    body = ",\n    ".join(json.dumps(value, ensure_ascii=False) for value in values)
    return f',\n  "{name}": [\n    {body}\n  ]'


def _entry_json(entry: Entry) -> dict[str, Any]:
    buckets = []
    for b in entry.buckets:
        bucket: dict[str, Any] = {"m": [b.first, b.last], "instance": b.instance}
        if b.gemm is not None:
            bucket["gemm"] = b.gemm
        buckets.append(bucket)
    key = ("encoding", "dtype", "group_size", "n", "k")
    return {**{name: getattr(entry, name) for name in key}, "buckets": buckets}


def read_table(path: Path) -> Table:
    """The table of a file.

    Raises:
        ValueError: naming the file, and the line where it is no JSON, else the field that is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: expected JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8: {error}") from error
    try:
        validate(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    entries = []
    for entry in content["entries"]:
        buckets = tuple(Bucket(b["m"][0], b["m"][1], b["instance"], b.get("gemm")) for b in entry["buckets"])
        entries.append(Entry(**{**entry, "buckets": buckets}))
    models = tuple(
        CostModel(model["encoding"], {family: tuple(model[family]) for family in FAMILIES})
        for model in content.get("models", [])
    )
    return Table(content["device"], content["processors"], tuple(entries), content["provenance"], models)
