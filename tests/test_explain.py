"""``pyquant.explain``, and what a call on the CPU makes of options that are for GPUs."""

from __future__ import annotations

import pytest
import torch
from conftest import VARIANTS, make_weight

import pyquant
from pyquant import _library


def packed(n: int = 40, k: int = 128) -> pyquant.PackedWeight:
    return make_weight(VARIANTS[0], n, k).pack()


@pytest.mark.parametrize(("m", "family"), [(1, "stream"), (20, "stream"), (21, "tile"), (300, "tile")])
def test_names_the_kernel_of_a_call(m: int, family: str) -> None:
    explanation = pyquant.explain(torch.randn(m, 128), packed())
    assert explanation.instance in {row["name"] for row in _library.instances() if row["available"]}
    assert explanation.instance.startswith(f"cpu_{family}_")
    assert not explanation.dense
    assert explanation.chosen_by == "rule"
    assert str(explanation) == f"{explanation.instance} (chosen by the rule)"


def test_a_dense_fallback_says_so() -> None:
    explanation = pyquant.Explanation("cuda_dequant", dense=True, chosen_by="table")
    assert str(explanation) == "cuda_dequant, then torch.nn.functional.linear (chosen by the table)"


def test_refuses_what_the_call_would_refuse() -> None:
    with pytest.raises(RuntimeError, match=r"x has K=100, the weight has K=128"):
        pyquant.explain(torch.randn(2, 100), packed())
    with pytest.raises(RuntimeError, match=r"bias: expected shape \[N=40\]"):
        pyquant.explain(torch.randn(2, 128), packed(), torch.randn(41))


def test_programmatic_launch_changes_nothing_on_the_cpu() -> None:
    weight, x = packed(), torch.randn(3, 128)
    assert torch.equal(pyquant.linear(x, weight, pdl=True), pyquant.linear(x, weight))
