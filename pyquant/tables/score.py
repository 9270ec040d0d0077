"""How good a table's choices are on measured times."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from .build import DEFAULT_MARGIN, build_table, dispatchable
from .lookup import Lookup
from .measurements import KEY, Measurements

IDEAL = 0.05  # a choice within this fraction of the best counts as ideal
DEFAULT_FALLBACK = "*_dequant*"


@dataclass(frozen=True)
class Cell:
    """One measured (weight, M) and what the table makes of it."""

    encoding: str
    dtype: str
    group_size: int
    n: int
    k: int
    m: int
    best: str
    best_us: float
    choice: str | None  # None: the table says nothing
    us: float | None  # of the choice; None: it was not measured here
    fallback_us: float | None  # None: no fallback was measured here

    @property
    def loss(self) -> float:
        """How much slower than the best the choice is, as a fraction; only where ``us`` is known."""
        assert self.us is not None
        return self.us / self.best_us - 1

    @property
    def where(self) -> str:
        return f"{self.encoding}, {self.dtype}, g{self.group_size or 'K'}, {self.n} x {self.k}"


@dataclass(frozen=True)
class Score:
    """Shares are fractions of the cells; losses fractions of the best instance's time.

    Attributes:
        cells: measured (weight, M).
        unknown: of which the table names nothing, or an instance that was not measured; left out below.
        ideal: share of choices within :data:`IDEAL` of the best.
        regressive: share of choices slower than the fallback, of the cells with a fallback; None: there is none.
        mean_loss, worst_loss: over the choices; None: there is none.
        worst: the cell of the worst loss.
    """

    cells: int
    unknown: int
    ideal: float | None
    regressive: float | None
    mean_loss: float | None
    worst_loss: float | None
    worst: Cell | None


def cells(lookup: Lookup, measurements: Measurements, fallback: str = DEFAULT_FALLBACK) -> Iterator[Cell]:
    """Every measured (weight, M) that has an instance to choose.

    Args:
        fallback: glob of the instances that count as the fallback, the fastest of several.
    """
    for key, rows in measurements.times.groupby([*KEY, "m"], sort=True):
        times = dict(zip(rows["instance"], rows["us"].astype(float), strict=True))
        allowed = dispatchable(times)
        if not allowed:
            continue
        encoding, dtype, group_size, n, k, m = key
        weight = (encoding, dtype, int(group_size), int(n), int(k))
        found = lookup.find(*weight, int(m))
        best = min(sorted(allowed), key=allowed.__getitem__)
        choice = None if found is None else found.bucket.instance
        fallbacks = [us for name, us in times.items() if fnmatchcase(name, fallback)]
        yield Cell(
            *weight,
            m=int(m),
            best=best,
            best_us=allowed[best],
            choice=choice,
            us=None if choice is None else allowed.get(choice),
            fallback_us=min(fallbacks, default=None),
        )


def score_cells(all_cells: Sequence[Cell]) -> Score:
    """The figures over ``all_cells``."""
    known = [cell for cell in all_cells if cell.us is not None]
    judged = [cell for cell in known if cell.fallback_us is not None]
    slower = sum(cell.us > cell.fallback_us for cell in judged)  # type: ignore[operator]
    worst = max(known, key=lambda cell: cell.loss, default=None)
    return Score(
        cells=len(all_cells),
        unknown=len(all_cells) - len(known),
        ideal=sum(cell.loss <= IDEAL for cell in known) / len(known) if known else None,
        regressive=slower / len(judged) if judged else None,
        mean_loss=sum(cell.loss for cell in known) / len(known) if known else None,
        worst_loss=None if worst is None else worst.loss,
        worst=worst,
    )


def split_by_shape(measurements: Measurements, share: float, seed: int) -> tuple[Measurements, Measurements]:
    """Training and test measurements: shapes (N, K), drawn at random, are in one of them with all their rows.

    Args:
        share: of the shapes that train.

    Raises:
        ValueError: when that leaves no shape for one of the two.
    """
    times = measurements.times
    shapes = sorted(set(zip(times["n"], times["k"], strict=True)))
    count = round(share * len(shapes))
    if not 0 < count < len(shapes):
        raise ValueError(f"split: expected shapes on both sides, got {count} of {len(shapes)} to train with")
    train = set(random.Random(seed).sample(shapes, count))
    trains = [shape in train for shape in zip(times["n"], times["k"], strict=True)]
    tests = [not t for t in trains]
    return replace(measurements, times=times[trains]), replace(measurements, times=times[tests])


def score_split(
    measurements: Measurements,
    share: float,
    seed: int,
    *,
    margin: float = DEFAULT_MARGIN,
    processors: int | None = None,
    fallback: str = DEFAULT_FALLBACK,
) -> Score:
    """A table built from ``share`` of the shapes, scored on the others."""
    train, test = split_by_shape(measurements, share, seed)
    lookup = Lookup(build_table(train, margin, processors))
    return score_cells(list(cells(lookup, test, fallback)))
