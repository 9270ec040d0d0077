"""Shapes that are slower than what is around them lets expect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .sweep import packed_labels

if TYPE_CHECKING:
    import pandas as pd

NEAR = 1 / 8  # neighbours of N are within this fraction of it
CAMPING = 0.05  # more time for a row of the weight than the neighbours' by this fraction
SLOW = 0.75  # of the median speedup of the other shapes


def with_neighbours(shapes: list[tuple[int, int]], step: int = 128) -> list[tuple[int, int]]:
    """The shapes, and for each N that is a power of two N - ``step`` and N + ``step`` behind it."""
    found = []
    for n, k in shapes:
        found += [(n, k), (n - step, k), (n + step, k)] if _is_power_of_two(n) and n * NEAR >= step else [(n, k)]
    return list(dict.fromkeys(found))


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def camping(sweep: pd.DataFrame) -> pd.DataFrame | None:
    """Weights whose N is a power of two, against neighbours of another N and the same K: what lies at multiples of a
    power of two may crowd into few memory channels ("memory camping").

    Columns: ``x``, ``who``, ``shape``, ``neighbours`` (their N), ``measured`` (M), ``slower at`` (M where a row of the
    weight takes :data:`CAMPING` more time than the mean of the neighbours'), ``worst`` (as a fraction, over all M).
    None: no neighbours were measured.
    """
    import pandas as pd

    lines = []
    for (dtype, label, k), rows in sweep.groupby(["dtype", "label", "k"], sort=False):
        sizes = sorted(set(rows["n"]))
        for n in filter(_is_power_of_two, sizes):
            near = [other for other in sizes if not _is_power_of_two(other) and abs(other - n) <= NEAR * n]
            table = rows[rows["n"].isin([n, *near])].pivot_table(index="m", columns="n", values="us")
            table = (table / table.columns).dropna()
            if not near or table.empty or n not in table:
                continue
            excess = table[n] / table[near].mean(axis=1) - 1
            slow = [str(m) for m, value in excess.items() if value > CAMPING]
            shown = ", ".join(slow) or "none"
            lines.append([dtype, label, f"{n} x {k}", ", ".join(map(str, near)), len(table), shown, excess.max()])
    if not lines:
        return None
    columns = ["x", "who", "shape", "neighbours", "measured", "slower at", "worst"]
    return pd.DataFrame(lines, columns=columns).sort_values("worst", ascending=False)


def slow_shapes(sweep: pd.DataFrame) -> pd.DataFrame:
    """Problems where the speedup of one of pyquant's labels over cuBLAS is below :data:`SLOW` of its median over the
    other shapes at that M. Columns: ``x``, ``weights``, ``shape``, ``M``, ``speedup``, ``median``."""
    import pandas as pd

    lines = []
    mine = sweep[sweep["label"].isin(packed_labels(sweep))].dropna(subset=["speedup"])
    for (dtype, label, m), rows in mine.groupby(["dtype", "label", "m"], sort=False):
        for row in rows.itertuples():
            median = rows.loc[rows["shape"] != row.shape, "speedup"].median()
            if row.speedup < SLOW * median:
                lines.append([dtype, label, row.shape, m, row.speedup, median])
    frame = pd.DataFrame(lines, columns=["x", "weights", "shape", "M", "speedup", "median"])
    return frame.iloc[(frame["speedup"] / frame["median"]).argsort()]
