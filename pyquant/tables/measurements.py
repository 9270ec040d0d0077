"""Times of kernel instances, from the CSV files of ``pyquant profile`` and of ``pyquant bench`` on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bench.environment import Environment
from ..bench.rows import INCORRECT, INSTANCE_PROVIDER
from .encoding import encoding_of_format

if TYPE_CHECKING:
    import pandas as pd

KEY = ["encoding", "dtype", "group_size", "n", "k"]
_NUMBERS = ("m", "n", "k", "us")
_REQUIRED = (*_NUMBERS, "format", "group_size", "dtype", "provider", "instance", "gpu")
_PROVENANCE = [f.name for f in fields(Environment) if f.name not in ("gpu", "command")]
# What must not be mixed in one table: times of different kinds.
_UNIFORM = ("cache", "launch")
# Providers whose rows are times of an instance, called plainly; the dispatch's own row says which it took.
_PROVIDERS = (INSTANCE_PROVIDER, "pyquant", "dequant+cublas")
_DENSE_SUFFIX = " + F.linear"
_DISPOSITIONS = ("passed", "not verified")


@dataclass(frozen=True)
class Measurements:
    """Times of one device.

    Attributes:
        device: its name.
        processors: its SMs, if the files say.
        times: one row for each (KEY, m, instance): ``us``, the median where it was measured several times.
        provenance: where they come from.
    """

    device: str
    processors: int | None
    times: pd.DataFrame
    provenance: dict[str, Any]


def is_dense(instance: str) -> bool:
    """Whether an instance dequantizes, for a dense GEMM behind it."""
    return instance.endswith("_dequant") or "_dequant_" in instance


def read_measurements(paths: Sequence[Path]) -> Measurements:
    """The usable times of CSV files: rows of instances that ran and were not found incorrect.

    Raises:
        ValueError: naming the file and the column or line: a column is missing, a cell is no number, several
            devices, times of different kinds, or no usable row.
    """
    import pandas as pd

    frame = pd.concat([_read(path) for path in paths], ignore_index=True)
    names = ", ".join(map(str, paths))
    device = _only(frame, "gpu", names)
    for column in _UNIFORM:
        if column in frame:
            _only(frame, column, names)
    processors = _only(frame, "processors", names) if "processors" in frame else ""
    keys = [*KEY, "m", "instance"]
    times = frame.groupby(keys, as_index=False)["us"].median()
    provenance: dict[str, Any] = {"gpu": device}
    for column in _PROVENANCE:
        if column in frame:
            provenance[column] = ", ".join(sorted({cell for cell in frame[column] if cell}))
    provenance["csv"] = [path.name for path in paths]
    return Measurements(device, int(processors) if processors else None, times, provenance)


def _read(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected CSV: {error}") from error
    missing = [column for column in _REQUIRED if column not in frame]
    if "disposition" not in frame and "check" not in frame:
        missing.append("disposition (or check)")
    if missing:
        raise ValueError(f"{path}: lacks the columns {', '.join(missing)}")
    frame["line"] = range(2, len(frame) + 2)
    usable = frame["provider"].isin(_PROVIDERS)
    if "disposition" in frame:
        usable &= frame["disposition"].isin(_DISPOSITIONS)
    else:
        usable &= frame["check"] != INCORRECT
    frame["instance"] = frame["instance"].str.removesuffix(_DENSE_SUFFIX)
    frame.loc[frame["provider"] == "dequant+cublas", "instance"] = "cuda_dequant"
    frame = frame[usable & (frame["instance"] != "")].copy()
    if frame.empty:
        raise ValueError(f"{path}: expected rows of pyquant's instances that ran, got none")
    for column in _NUMBERS:
        numbers = pd.to_numeric(frame[column], errors="coerce")
        bad = frame[~(numbers > 0)]
        if not bad.empty:
            raise ValueError(
                f"{path}:{bad['line'].iloc[0]}: {column}: expected a positive number, got {bad[column].iloc[0]!r}"
            )
        frame[column] = numbers
    for column in ("m", "n", "k"):
        frame[column] = frame[column].astype("int64")
    groups = pd.to_numeric(frame["group_size"], errors="coerce")
    bad = frame[~(groups > 0)]
    if not bad.empty:
        line, cell = bad["line"].iloc[0], bad["group_size"].iloc[0]
        raise ValueError(f"{path}:{line}: group_size: expected a positive number, got {cell!r}")
    encodings: dict[tuple[str, int, int], str] = {}
    cells = list(zip(frame["format"], groups.astype("int64"), frame["k"], strict=True))
    for cell, line in zip(cells, frame["line"], strict=True):
        if cell not in encodings:
            try:
                encodings[cell] = encoding_of_format(*cell)
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from error
    frame["encoding"] = [encodings[cell] for cell in cells]
    # 0: one group per row.
    frame["group_size"] = groups.where(groups < frame["k"], 0).astype("int64")
    return frame


def _only(frame: pd.DataFrame, column: str, names: str) -> str:
    values = sorted(set(frame[column]))
    if len(values) != 1:
        raise ValueError(f"{names}: {column}: expected one value in all rows, got {', '.join(map(repr, values))}")
    return values[0]
