"""The cost model: its fit, what it is asked for, and how good its choices are on the times of the H200."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from table_data import bucket, damage, entry, error_of_loading, table

from pyquant import _library
from pyquant.tables import CostModel, Table, read_table
from pyquant.tables.cost_model import FEWEST_SHAPES, fit_models
from pyquant.tables.lookup import Choice, Lookup
from pyquant.tables.measurements import read_measurements
from pyquant.tables.schema import FAMILIES
from pyquant.tables.score import score_split

ROOT = Path(__file__).resolve().parent.parent
H200 = ROOT / "profiles" / "h200"
SHIPPED = read_table(H200 / "table.json")
MODELS = {model.encoding: model for model in SHIPPED.models}
STREAM, WGMMA, DENSE = "cuda_stream_int4_bf16", "cuda_wgmma_int4_bf16", "cuda_dequant"
SHAPES = [(512, 2048), (1024, 8192), (3072, 768), (4096, 4096), (6144, 4096), (8192, 8192), (9216, 3072), (28672, 4096)]
TOKENS = [1, 8, 16, 24, 32, 64, 128, 512, 2048]


def predict(model: CostModel, family: str, n: int, k: int, m: int, processors: int = 132) -> float:
    shapes = [np.array([value], dtype=np.int64) for value in (n, k, m)]
    index = list(FAMILIES).index(family)
    return float(_library.predict(index, np.array(model.coefficients[family]), shapes, processors)[0])


def modelled(*entries: Any, processors: int | None = 132) -> Table:
    return replace(table(*(entries or [entry(64, 64)]), processors=processors), models=SHIPPED.models)


def find(
    content: Table, n: int, k: int, m: int = 1, encoding: str = "int4", dtype: str = "bf16", g: int = 128
) -> Choice | None:
    return Lookup(content).find(encoding, dtype, g, n, k, m)


# ---- the fit


def times_of(model: CostModel, noise: float, shapes: list[tuple[int, int]] = SHAPES) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    names = {"stream": STREAM, "wgmma": WGMMA, "dense": DENSE}
    rows = [
        {"encoding": "int4", "dtype": "bf16", "n": n, "k": k, "m": m, "instance": name,
         "us": predict(model, family, n, k, m) / 1e3 * float(np.exp(rng.normal(0, noise)))}
        for (n, k), m, (family, name) in itertools.product(shapes, TOKENS, names.items())
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_fit_finds_the_model_that_made_the_times() -> None:
    true = CostModel("int4", {f: tuple(1.4 * c for c in MODELS["int4"].coefficients[f]) for f in FAMILIES})
    (fitted,) = fit_models(times_of(true, noise=0.01), processors=132)
    assert fitted.encoding == "int4"
    for family, (n, k), m in itertools.product(FAMILIES, SHAPES, TOKENS):
        if family == "stream" and m > 32:
            continue
        ratio = predict(fitted, family, n, k, m) / predict(true, family, n, k, m)
        assert abs(ratio - 1) < 0.03, (family, n, k, m, ratio)


def test_one_bad_time_does_not_bend_the_fit() -> None:
    times = times_of(MODELS["int4"], noise=0.01)
    times.loc[times.index[100], "us"] *= 20
    (fitted,) = fit_models(times, processors=132)
    for family in FAMILIES:
        ratio = predict(fitted, family, 4096, 4096, 16) / predict(MODELS["int4"], family, 4096, 4096, 16)
        assert abs(ratio - 1) < 0.04, family


def test_few_shapes_make_no_model() -> None:
    few = SHAPES[: FEWEST_SHAPES - 1]
    assert fit_models(times_of(MODELS["int4"], 0.01, few), processors=132) == ()
    times = times_of(MODELS["int4"], 0.01)
    assert fit_models(times[times["instance"] != WGMMA], processors=132) == (), "a family is missing"
    assert fit_models(times.assign(dtype="fp32"), processors=132) == ()


def test_predictions() -> None:
    """What the forms have to say, whatever the coefficients."""
    model = MODELS["int4"]
    for family in FAMILIES:
        assert predict(model, family, 8192, 8192, 16) > predict(model, family, 4096, 4096, 16)
        assert predict(model, family, 4096, 4096, 4096) > 1.8 * predict(model, family, 4096, 4096, 2048)
        assert predict(model, family, 8192, 8192, 16, processors=66) > predict(model, family, 8192, 8192, 16)
    assert predict(model, "dense", 32001, 4096, 512) > 2 * predict(model, "dense", 32000, 4096, 512)
    assert predict(model, "dense", 4096, 4100, 512) > 2 * predict(model, "dense", 4096, 4096, 512)
    assert predict(model, "wgmma", 1280, 3420, 2) == np.inf, "rows of x that TMA does not take"
    assert predict(model, "wgmma", 1280, 3420, 1) < np.inf
    assert predict(model, "stream", 4096, 4096, 64) == pytest.approx(2 * predict(model, "stream", 4096, 4096, 32))


@pytest.mark.parametrize(
    ("family", "processors", "words"), [(3, 132, "family: expected 0 to 2, got 3"), (0, 0, "processors: expected")]
)
def test_wrong_predictions_are_refused(family: int, processors: int, words: str) -> None:
    one = np.array([64], dtype=np.int64)
    with pytest.raises(RuntimeError, match=words):
        _library.predict(family, np.ones(17), [one, one, one], processors)


# ---- the lookup


def test_what_was_measured_counts_and_the_rest_is_predicted() -> None:
    content = modelled(entry(4096, 4096, bucket(1, None, WGMMA)))
    assert find(content, 4096, 4096) == Choice(bucket(1, None, WGMMA), 128, 4096, 4096, predicted=False)
    near = find(content, 4096, 4160)
    assert near is not None
    assert near.predicted
    assert (near.n, near.k, near.group_size) == (4096, 4160, 128)
    assert near.bucket.instance == STREAM
    other_group = find(content, 4096, 4096, g=64)
    assert other_group is not None
    assert not other_group.predicted, "the nearest measured group size of the same shape"


def test_the_choice_is_the_fastest_prediction() -> None:
    """At the M for which times are predicted; dequantizing unless that is 6% slower."""
    content = modelled()
    lookup = Lookup(content)
    chosen = set()
    for (n, k), m, encoding in itertools.product([*SHAPES, (50257, 768), (1280, 3420)], TOKENS, MODELS):
        model = MODELS[encoding]
        ns = {family: predict(model, family, n, k, m) for family in FAMILIES}
        gemm = "wgmma" if ns["wgmma"] < ns["stream"] else "stream"
        expected = "dense" if ns["dense"] < 1.06 * ns[gemm] else gemm
        found = lookup.find(encoding, "bf16", 128, n, k, m)
        assert found is not None
        names = {family: f"cuda_{family}_{encoding}_bf16" for family in ("stream", "wgmma")} | {"dense": DENSE}
        assert found.bucket.instance == names[expected], (n, k, m, encoding, ns)
        assert found.bucket.gemm == (names[gemm] if expected == "dense" else None)
        chosen.add(expected)
    assert chosen == set(FAMILIES), "each is the best somewhere"


def test_who_gets_predictions() -> None:
    content = modelled()
    names = {"int4": "int4", "uint4": "int4", "int4-nested": "int4", "codebook4": "codebook4",
             "codebook4-nested": "codebook4"}  # fmt: skip
    for (encoding, kernel), dtype in itertools.product(names.items(), ("bf16", "fp16")):
        found = find(content, 4096, 4096, 1, encoding, dtype)
        assert found is not None
        assert found.predicted
        assert found.bucket.instance == f"cuda_stream_{kernel}_{dtype}"
    for encoding, dtype in (("int8", "bf16"), ("codebook3", "bf16"), ("codebook4-flat", "bf16"), ("int4", "fp32")):
        assert find(content, 4096, 4096, 1, encoding, dtype) is None, (encoding, dtype)
    assert find(modelled(processors=None), 4096, 4096, 1, "uint4") is None, "it does not know how many SMs there are"


def test_a_gpu_without_a_table_gets_predictions_for_its_sms() -> None:
    assert Lookup(device="NVIDIA Unheard-of").find("int4", "bf16", 128, 4096, 4096, 1) is None
    found = Lookup(device="NVIDIA Unheard-of", processors=78).find("int4", "bf16", 128, 4096, 4096, 1)
    assert found is not None
    assert found.predicted
    assert found.bucket.instance == STREAM
    few, many = (Lookup(device="NVIDIA Unheard-of", processors=sms) for sms in (33, 132))
    asked = [("codebook4", "bf16", 64, n, k, m) for (n, k), m in itertools.product(SHAPES, TOKENS)]
    assert [few.find(*a) for a in asked] != [many.find(*a) for a in asked], "fewer SMs, other choices"


# ---- files


BAD = {
    "count": ('"wgmma": [', '"wgmma": [1.5, ', "wgmma: expected 15 coefficients, got 16"),
    "negative": ('"stream": [', '"stream": [-', "stream: expected positive coefficients"),
    "no number": ('"dense": [', '"dense": ["4", ', "expected a number"),
    "family": ('"dense"', '"cublas"', "expected encoding, stream, wgmma or dense, got 'cublas'"),
    "encoding": (
        '"encoding": "int4", "stream"',
        '"encoding": "int8", "stream"',
        "encoding: expected int4 or codebook4",
    ),
    "twice": ('"encoding": "codebook4", "stream"', '"encoding": "int4", "stream"', "a model of int4 came before"),
    "missing": ('"encoding": "int4", "stream"', '"stream"', "a model lacks one of encoding"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_model_is_an_error_with_its_line(case: str, tmp_path: Path) -> None:
    old, new, words = BAD[case]
    path = damage(tmp_path / "bad.json", modelled().to_json(), old, new)
    error_of_loading(path, words)
    with pytest.raises(ValueError, match=r"bad\.json: "):
        read_table(path)


def test_reading_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(modelled().to_json())
    assert read_table(path) == modelled()
    assert list(json.loads(path.read_text())["models"][0]) == ["encoding", *FAMILIES]


# ---- how good it is


@pytest.fixture(scope="module")
def measured() -> Any:
    return read_measurements([H200 / "profile.csv"])


def test_predictions_are_near_the_times_of_the_h200(measured: Any) -> None:
    times = measured.times
    for encoding, model in MODELS.items():
        rows = times[times["encoding"] == encoding]
        for family, (name, most) in {"stream": ("_stream_", 32), "wgmma": ("_wgmma_", 4096),
                                     "dense": ("_dequant", 4096)}.items():  # fmt: skip
            of = rows[rows["instance"].str.contains(name) & (rows["m"] <= most)]
            errors = [
                np.log(predict(model, family, n, k, m) / (us * 1e3))
                for n, k, m, us in of[["n", "k", "m", "us"]].itertuples(index=False)
            ]
            assert len(errors) > 200
            assert np.std(errors) < 0.1, (encoding, family)
            assert abs(np.mean(errors)) < 0.02, (encoding, family)


def test_weights_that_the_table_has_not_seen(measured: Any) -> None:
    """Half of the 41 weights build the table, the other half judges it; docs/performance.md has the figures."""
    scores = [score_split(measured, 0.5, seed) for seed in range(3)]
    assert all(score.cells == 630 for score in scores)
    assert np.mean([score.ideal for score in scores]) > 0.94
    assert np.mean([score.regressive for score in scores]) < 0.015
