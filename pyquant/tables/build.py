"""From measured times to a table: winners over M, with a margin so that noise does not flip them.

Between the measured M the rule is: what was measured at the next M up, since kernels work on tiles of tokens; above
the largest measured M, what was measured there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .cost_model import fit_models
from .measurements import KEY, Measurements, is_dense
from .table import Bucket, Entry, Table

DEFAULT_MARGIN = 0.02

Times = Mapping[int, Mapping[str, float]]  # M -> instance -> us


def build_table(measurements: Measurements, margin: float = DEFAULT_MARGIN, processors: int | None = None) -> Table:
    """The table of measured times.

    Args:
        measurements: of one device.
        margin: what a change of instance along M must gain, as a fraction of the time of one call; see :func:`winners`.
        processors: the device's SMs, where the measurements do not say; without them there are no cost models.
    """
    entries = []
    for key, rows in measurements.times.groupby(KEY, sort=True):
        encoding, dtype, group_size, n, k = key
        times: dict[int, dict[str, float]] = {}
        for m, instance, us in zip(rows["m"], rows["instance"], rows["us"], strict=True):
            times.setdefault(int(m), {})[instance] = float(us)
        entries.append(
            Entry(encoding, dtype, int(group_size), int(n), int(k), _buckets(dict(sorted(times.items())), margin))
        )
    provenance: dict[str, Any] = {**measurements.provenance, "margin": margin}
    processors = processors or measurements.processors
    models = fit_models(measurements.times, processors) if processors else ()
    return Table(measurements.device, processors, tuple(entries), provenance, models)


def dispatchable(instances: Mapping[str, float]) -> dict[str, float]:
    """Those times of one M that the dispatch may choose from: on a CPU no calls follow with a dense GEMM."""
    return {name: us for name, us in instances.items() if not (name.startswith("cpu_") and is_dense(name))}


def winners(times: Times, margin: float) -> list[str]:
    """The instance of each measured M, in its order.

    Of all sequences the one with the least ``sum over M of loss + ln(1 + margin) * changes``, where ``loss`` is
    ``ln(us / best us)``, of which a hundredth counts where the margin is not exceeded: noise does not add up, and an
    instance gives way to another only where that saves more than the margin over the M that the other takes. Equal
    sums: the first in alphabetical order.
    """
    switch = math.log1p(margin)

    def loss_of(us: float, best: float) -> float:
        loss = math.log(us / best)
        return loss if loss > switch else loss / 100

    cost: dict[str, float] = {}  # of the best sequence that ends with an instance
    paths: dict[str, list[str]] = {}
    for instances in times.values():
        best = min(instances.values())
        ending = min(sorted(cost), key=cost.__getitem__) if cost else None
        next_cost, next_paths = {}, {}
        for name in sorted(instances):
            loss = loss_of(instances[name], best)
            if ending is None:
                next_cost[name], next_paths[name] = loss, [name]
                continue
            stay = cost.get(name, math.inf)
            change = cost[ending] + switch
            before = name if stay <= change else ending
            next_cost[name] = min(stay, change) + loss
            next_paths[name] = [*paths[before], name]
        cost, paths = next_cost, next_paths
    return paths[min(sorted(cost), key=cost.__getitem__)]


def _buckets(times: Times, margin: float) -> tuple[Bucket, ...]:
    allowed = {m: dispatchable(instances) for m, instances in times.items()}
    allowed = {m: instances for m, instances in allowed.items() if instances}
    if not allowed:
        raise ValueError(f"expected times of GEMM instances, got those of {', '.join(sorted({*_names(times)}))} only")
    chosen = winners(allowed, margin)
    gemms = {m: _without_dense(instances) for m, instances in allowed.items()}
    with_gemm = {m: instances for m, instances in gemms.items() if instances}
    gemm_of = dict(zip(with_gemm, winners(with_gemm, margin), strict=True)) if with_gemm else {}
    pairs = [(name, gemm_of.get(m) if is_dense(name) else None) for m, name in zip(allowed, chosen, strict=True)]
    return _merge(list(allowed), pairs)


def _merge(tokens: Sequence[int], pairs: Sequence[tuple[str, str | None]]) -> tuple[Bucket, ...]:
    """Neighbours that run the same become one bucket; each ends at its last measured M."""
    buckets: list[Bucket] = []
    for i, (instance, gemm) in enumerate(pairs):
        if i + 1 < len(pairs) and pairs[i + 1] == (instance, gemm):
            continue
        first = 1 if not buckets else (buckets[-1].last or 0) + 1
        buckets.append(Bucket(first, tokens[i] if i + 1 < len(pairs) else None, instance, gemm))
    return tuple(buckets)


def _without_dense(instances: Mapping[str, float]) -> dict[str, float]:
    return {name: us for name, us in instances.items() if not is_dense(name)}


def _names(times: Times) -> set[str]:
    return {name for instances in times.values() for name in instances}
