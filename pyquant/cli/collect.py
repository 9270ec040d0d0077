"""What ``pyquant bench`` measured on a GPU until it ended, one way or another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import click

from ..bench.environment import Environment
from ..bench.gpu import BrokenDevice, Skip
from ..bench.rows import csv_writer
from .exits import INTERRUPTED
from .output import progress

R = TypeVar("R", bound=Environment)


@dataclass
class Collected(Generic[R]):
    """Rows and skips so far, each skip once; ``broken`` if the device broke."""

    cells: int
    rows: list[R] = field(default_factory=list)
    skips: dict[Skip, None] = field(default_factory=dict)
    interrupted: bool = False
    broken: BrokenDevice | None = None

    def raise_early_end(self) -> None:
        """Say how the run ended before its last cell, if it did.

        Raises:
            click.exceptions.Exit: 130 when interrupted.
            click.ClickException: the device broke.
        """
        if self.interrupted:
            click.echo(f"interrupted: {len(self.rows)} of {self.cells} cells were measured", err=True)
            raise click.exceptions.Exit(INTERRUPTED)
        if self.broken:
            raise click.ClickException(str(self.broken))


def collect(
    measure: Callable[[], Iterable[R | Skip]], row_type: type[R], cells: int, csv_path: Path | None
) -> Collected[R]:
    """Run ``measure`` to its end, or until Ctrl-C or a broken device; rows go to ``csv_path`` at once, skips to stderr
    at the end."""
    found = Collected[R](cells)
    with ExitStack() as stack:
        write = stack.enter_context(csv_writer(csv_path, row_type)) if csv_path else None
        try:
            for item in progress(measure(), "measuring", cells):
                if isinstance(item, Skip):
                    found.skips[item] = None
                    continue
                found.rows.append(item)
                if write:
                    write(item)
        except KeyboardInterrupt:
            found.interrupted = True
        except BrokenDevice as error:
            found.broken = error
    for skip in found.skips:
        click.echo(f"{skip.label}: {'failed:' if skip.failed else 'not available because'} {skip.reason}", err=True)
    return found
