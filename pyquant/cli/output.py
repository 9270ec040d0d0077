"""What commands print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import click
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

T = TypeVar("T")


def print_json(value: object) -> None:
    """One JSON document on stdout; NaN and Inf, which JSON does not have, become null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on stdout: the first column to the left, the others to the right.

    On a terminal long names are folded; in a pipe lines are as long as they need to be, for other programs.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        unlimited = Console(width=10_000).measure(table).maximum
        console = Console(highlight=False, markup=False, width=max(80, unlimited))
    console.print(table)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The items, with a progress bar on stderr if that is a terminal; ``total`` of them, unless they have a length."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, total=total, description=description)


def size(nbytes: float) -> str:
    """Bytes for people, in powers of 1000: ``12.3 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"
