"""The rows of a GPU benchmark, and the CSV files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, get_type_hints

from .environment import Environment

PASSED, INCORRECT = "passed", "incorrect"
ROWS_FILE = "rows.csv"  # in the folder of a report
INSTANCE_PROVIDER = "pyquant instance"  # the provider of rows of one kernel instance, whatever the dispatch takes


@dataclass(frozen=True)
class _Figures:
    """The columns of a row without those of its run."""

    m: int  # tokens
    n: int  # out_features
    k: int  # in_features
    format: str  # of the weight
    group_size: int | None
    dtype: str  # of x and y
    provider: str
    instance: str  # the kernel that ran, where known
    us: float  # per call: the median over replays
    us_p10: float
    us_p90: float
    do_bench_us: float | None  # triton.testing.do_bench: one call at a time, L2 flushed before each
    copies: int  # of the weight, in turns
    weight_bytes: int  # of one copy: codes, scales and whatever else the kernel reads
    gb_per_s: float  # weight_bytes / us
    tflops: float  # 2 M N K / us
    floor_us: float | None  # reading weight_bytes and nothing else
    floor_fraction: float | None  # floor_us / us
    ratio_to_cublas: float | None
    best_peer: str  # the fastest provider that is not pyquant's
    ratio_to_best_peer: float | None  # of pyquant's rows
    check: str  # passed, incorrect, or "" where there is nothing to compare with
    error: float | None  # norm of y - reference over the norm of the reference


@dataclass(frozen=True)
class Row(Environment, _Figures):
    """One provider on one problem; the fields are the CSV's columns, None and "" its empty cells.

    Ratios are speedups: 2 means twice as fast as what is named.
    """

    @property
    def ours(self) -> bool:
        """Whether pyquant's kernels made the row."""
        return self.provider.startswith(("pyquant", "dequant"))

    @property
    def label(self) -> str:
        """The name of a line in tables and plots."""
        if self.provider == INSTANCE_PROVIDER:
            return f"{self.instance} {self.format}"
        return f"{self.provider} {self.format}" if self.ours else self.provider


COLUMNS = [field.name for field in fields(Row)]


class RowWriter(Protocol):
    """What :func:`csv_writer` gives."""

    def __call__(self, row: Environment) -> None: ...


@contextmanager
def csv_writer(path: Path, row_type: type[Environment] = Row) -> Iterator[RowWriter]:
    """Writes rows of ``row_type``, a dataclass, to ``path``, each one to the disk at once, so that an interrupted run
    keeps what it measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(row_type)])
        writer.writeheader()
        file.flush()

        def write(row: Environment) -> None:
            writer.writerow(asdict(row))
            file.flush()

        yield write


def read_csv(path: Path) -> list[Row]:
    """The rows of a file of :func:`csv_writer`.

    Raises:
        ValueError: naming the file and the line, when columns are missing or unknown, or a cell is no number.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        header = reader.fieldnames or []
        missing = [c for c in COLUMNS if c not in header]
        unknown = [c for c in header if c not in COLUMNS]
        if missing or unknown:
            problems = [f"{word} {', '.join(names)}" for word, names in (("lacks", missing), ("has", unknown)) if names]
            raise ValueError(
                f"{path}: expected the columns of `pyquant bench --csv` on a GPU; it {'; '.join(problems)}"
            )
        rows = [_row(path, reader.line_num, cells) for cells in reader]
    if not rows:
        raise ValueError(f"{path}: expected rows below the header, got none")
    return rows


_HINTS = get_type_hints(Row)


def _row(path: Path, line: int, cells: dict[str, str | None]) -> Row:
    values: dict[str, Any] = {}
    for column in COLUMNS:
        cell = cells[column]
        if cell is None or None in cells:
            raise ValueError(f"{path}:{line}: expected {len(COLUMNS)} cells")
        try:
            values[column] = _value(cell, _HINTS[column])
        except ValueError:
            raise ValueError(f"{path}:{line}: {column}: expected a number, got {cell!r}") from None
    return Row(**values)


def _value(cell: str, hint: Any) -> Any:
    if hint is str:
        return cell
    if cell == "" and hint not in (int, float):
        return None
    return int(cell) if hint in (int, int | None) else float(cell)
