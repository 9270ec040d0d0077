"""``linear(x, weight, transposed=True)``, y[M, K] = x[M, N] @ W: its values, gradients, graphs, errors and C API on the
CPU, where the weight is dequantized for torch's own GEMM."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    VARIANTS,
    CxGemmArgs,
    Variant,
    assert_within_budget,
    c_library,
    c_weight,
    each_dtype,
    each_variant,
    exact_weight,
    make_weight,
)
from torch._dynamo.testing import CompileCounterWithBackend

from pyquant import PackedWeight, _library, explain, linear
from pyquant.ops import op_arguments

DENSE_FALLBACK, TRANSPOSED = 2, 4  # CX_GEMM_...
NOT_SUPPORTED = 2  # CX_NOT_SUPPORTED


def packed_and_exact(variant: Variant = VARIANTS[0], n: int = 33, k: int = 70) -> tuple[PackedWeight, torch.Tensor]:
    weight = make_weight(variant, n, k)
    return weight.pack(), exact_weight(weight)


# ---- values


@each_variant
@each_dtype
def test_budget(variant: Variant, dtype: torch.dtype) -> None:
    for n, k in [(33, 70), (64, 128), (1, 65)]:
        packed, w_exact = packed_and_exact(variant, n, k)
        for m, bias in [(1, None), (5, torch.randn(k).to(dtype)), (40, None)]:
            x = torch.randn(m, n).to(dtype)
            assert_within_budget(linear(x, packed, bias, transposed=True), x, w_exact.T, bias, dense=True)


def test_identity_gives_back_the_weight() -> None:
    weight = make_weight(VARIANTS[0], 33, 70)
    assert torch.equal(linear(torch.eye(33), weight.pack(), transposed=True), weight.dequantize())


@each_dtype
def test_any_x(dtype: torch.dtype) -> None:
    packed, w_exact = packed_and_exact()
    bias = torch.randn(70).to(dtype)
    base = torch.randn(12, 200).to(dtype)
    views = {
        "row stride above N": base[:, :33],
        "offset": base[3:, 5:38],
        "stride 2": base[:, :66:2],
        "transposed": torch.randn(33, 9).to(dtype).T,
        "expanded": base[:1, :33].expand(17, 33),
        "3-D": base[:, :99].reshape(4, 3, 3, 33)[:, 1],
        "1-D": base[2, :33],
        "no rows": base[:0, :33],
        "no rows, 3-D": torch.empty(2, 0, 33, dtype=dtype),
    }
    for what, x in views.items():
        y = linear(x, packed, bias, transposed=True)
        assert y.shape == (*x.shape[:-1], 70), what
        assert y.dtype == dtype
        assert_within_budget(y, x, w_exact.T, bias, dense=True)


def test_explain() -> None:
    packed, _ = packed_and_exact()
    explanation = explain(torch.randn(3, 33), packed, transposed=True)
    assert explanation.instance.startswith("cpu_dequant_")
    assert explanation.dense
    assert explanation.chosen_by == "rule"
    assert not explain(torch.randn(3, 70), packed).dense
    with pytest.raises(RuntimeError, match=r"x has N=70, the weight has N=33"):
        explain(torch.randn(3, 70), packed, transposed=True)


def test_programmatic_launch_changes_nothing_on_the_cpu() -> None:
    packed, _ = packed_and_exact()
    x = torch.randn(3, 33)
    assert torch.equal(linear(x, packed, transposed=True, pdl=True), linear(x, packed, transposed=True))


def test_autocast_leaves_the_operator_alone() -> None:
    """torch's own GEMM inside the operator runs in x's dtype, not in autocast's."""
    packed, _ = packed_and_exact()
    x, bias = torch.randn(5, 33), torch.randn(70)
    expected = linear(x, packed, bias, transposed=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, packed, bias, transposed=True)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_instances_of_transposed_products_are_gemms_of_their_own() -> None:
    rows = _library.instances()
    assert all(row["is_gemm"] for row in rows if row["is_transposed"])
    assert all(row["is_transposed"] == row["name"].startswith("cuda_transposed_") for row in rows)


# ---- gradients


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_dequantized_weight(transposed: bool) -> None:
    weight = make_weight(VARIANTS[0], 33, 70)
    packed = weight.pack()
    w = weight.dequantize().T if transposed else weight.dequantize()
    x = torch.randn(2, 3, w.shape[1], requires_grad=True)
    bias = torch.randn(w.shape[0], requires_grad=True)
    upstream = torch.randn(2, 3, w.shape[0])
    got = torch.autograd.grad(linear(x, packed, bias, transposed=transposed), (x, bias), upstream)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, w, bias), (x, bias), upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_second_derivatives() -> None:
    """The backward of a product is differentiable: it is the same operator the other way round."""
    weight = make_weight(VARIANTS[0], 33, 70)
    packed, w = weight.pack(), weight.dequantize()
    x = torch.randn(4, 33, requires_grad=True)

    def penalty(y: torch.Tensor) -> torch.Tensor:
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    got, expected = penalty(linear(x, packed, transposed=True)), penalty(x @ w)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@each_dtype
def test_gradients_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    packed, w_exact = packed_and_exact()
    x = torch.randn(5, 33).to(dtype).requires_grad_()
    upstream = torch.randn(5, 70).to(dtype)
    linear(x, packed, transposed=True).backward(upstream)
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert_within_budget(x.grad, upstream, w_exact)


def test_no_dequantized_weight_is_kept_for_backward() -> None:
    packed, _ = packed_and_exact(n=64, k=128)
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(torch.randn(3, 64, requires_grad=True), packed, transposed=True)
    pointers = {t.data_ptr() for t in packed.tensors().values()}
    assert saved
    assert all(t.data_ptr() in pointers for t in saved)


def test_only_what_asks_gets_a_gradient() -> None:
    packed, _ = packed_and_exact()
    for wants_x, wants_bias in [(True, False), (False, True), (False, False)]:
        x, bias = torch.randn(5, 33, requires_grad=wants_x), torch.randn(70, requires_grad=wants_bias)
        y = linear(x, packed, bias, transposed=True)
        assert y.requires_grad == (wants_x or wants_bias)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == wants_x
        assert (bias.grad is not None) == wants_bias


# ---- compile, export


def test_opcheck() -> None:
    packed, _ = packed_and_exact()
    tensors, (spec, n, k) = op_arguments(packed)
    for bias in (None, torch.randn(70, requires_grad=True)):
        x = torch.randn(5, 33, requires_grad=True)
        torch.library.opcheck(torch.ops.pyquant.gemm.default, (x, *tensors, bias, spec + (1 << 61), n, k))


def test_compile_full_graph_with_gradients() -> None:
    """One graph for any number of tokens, forward and backward."""
    packed, _ = packed_and_exact()
    counter = CompileCounterWithBackend("aot_eager")
    f = torch.compile(
        lambda x: linear(linear(x, packed, transposed=True).relu(), packed),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for m in (5, 2, 9):
        x = torch.randn(m, 33, requires_grad=True)
        y = f(x)
        expected = linear(linear(x, packed, transposed=True).relu(), packed)
        assert torch.equal(y, expected)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
    assert counter.frame_count == 1


def test_export_with_dynamic_tokens() -> None:
    packed, _ = packed_and_exact()

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear(x, packed, transposed=True)

    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(Module(), (torch.randn(5, 33),), dynamic_shapes={"x": {0: tokens}})
    for m in (1, 5, 70):
        x = torch.randn(m, 33)
        assert torch.equal(program.module()(x), Module()(x))


# ---- errors


WRONG: list[tuple[str, Callable[[PackedWeight], Any], str]] = [
    ("K columns", lambda w: linear(torch.randn(2, 70), w, transposed=True), r"^gemm: x has N=70, the weight has N=33$"),
    ("scalar", lambda w: linear(torch.tensor(1.0), w, transposed=True), r"^gemm: x has a scalar, the weight has N=33$"),
    ("dtype", lambda w: linear(torch.randn(2, 33).double(), w, transposed=True), r"^gemm: x: expected Float, Half or"),
    (
        "bias",
        lambda w: linear(torch.randn(2, 33), w, torch.randn(33), transposed=True),
        r"^gemm: bias: expected shape \[K=70\], got 33 values in 1 dimensions$",
    ),
    (
        "bias dtype",
        lambda w: linear(torch.randn(2, 33), w, torch.randn(70).half(), transposed=True),
        r"^gemm: bias: expected a contiguous CPU tensor of Float, got CPU tensor of Half$",
    ),
]


@pytest.mark.parametrize(("call", "message"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_errors(call: Callable[[PackedWeight], Any], message: str) -> None:
    packed, _ = packed_and_exact()
    with pytest.raises(RuntimeError, match=message):
        call(packed)


def test_fake_kernels_refuse_what_the_kernels_refuse() -> None:
    packed, _ = packed_and_exact()
    f = torch.compile(lambda x: linear(x, packed, transposed=True), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"the weight has N=33"):
        f(torch.randn(2, 70))


# ---- C API


def c_call(function: str, flags: int, *result: Any, **changes: int) -> tuple[int, bytes]:
    """Status and message of a call on x [2, 33] and y [2, 70]."""
    packed, _ = packed_and_exact()
    struct, x, y = c_weight(packed), torch.randn(2, 33), torch.full((2, 70), 7.0)
    given = {"m": 2, "x": x.data_ptr(), "ldx": 33, "y": y.data_ptr(), "ldy": 70, "instance": -1, "flags": flags}
    args = CxGemmArgs(weight=ctypes.pointer(struct), **{**given, **changes})
    library = c_library()
    status = getattr(library, function)(ctypes.byref(args), *result)
    assert bool((y == 7).all())
    return status, library.cx_last_error() if status != 0 else b""


def test_c_api_names_the_instance_that_dequantizes() -> None:
    index = ctypes.c_int32()
    assert c_call("cx_select_instance", TRANSPOSED | DENSE_FALLBACK, ctypes.byref(index)) == (0, b"")
    row = _library.instances()[index.value]
    assert row["name"].startswith("cpu_dequant_")
    assert not row["is_gemm"]


def test_c_api_says_that_the_cpu_has_no_kernel() -> None:
    status, message = c_call("cx_gemm", TRANSPOSED)
    assert status == NOT_SUPPORTED
    assert message == b"cx_gemm: instance: this build has none for the problem"


def test_c_api_checks_strides_by_the_orientation() -> None:
    status, message = c_call("cx_gemm", TRANSPOSED, ldx=32)
    assert (status, message) == (1, b"cx_gemm: ldx: expected at least N=33, or 0 for one row repeated, got 32")
    status, message = c_call("cx_gemm", TRANSPOSED, ldy=69)
    assert (status, message) == (1, b"cx_gemm: ldy: expected at least K=70, got 69")


def test_c_api_refuses_instances_of_the_other_orientation() -> None:
    cpu = next(i for i, row in enumerate(_library.instances()) if row["device"] == "cpu" and row["is_gemm"])
    status, message = c_call("cx_gemm", TRANSPOSED, instance=cpu)
    assert status == NOT_SUPPORTED
    assert b"does not cover this weight, dtype or shape" in message
