"""The operators under PyTorch: opcheck, gradients, compile, export, autocast, errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    VARIANTS,
    Variant,
    assert_within_budget,
    each_dtype,
    exact_weight,
    gemm_instances,
    make_weight,
    random_weight,
)
from torch._dynamo.testing import CompileCounterWithBackend

from pyquant import PackedWeight, linear
from pyquant.nn import QuantLinear
from pyquant.ops import dequantize, encode_spec, op_arguments

OPTIONAL = ("zeros", "codebook", "nested_map", "nested_absmax", "nested_offset", "tensor_scale")
OPTIONAL_ARGUMENTS = ("zeros", "codebook", "scale_data")  # of the operators, for packed weights
# One combination for each set of tensors that weights may have.
REPRESENTATIVES = list(
    {(v.zero_type, *sorted(random_weight(v, 1, 64).tensors())): v for v in reversed(VARIANTS)}.values()
)
representatives = pytest.mark.parametrize("variant", REPRESENTATIVES, ids=str)
GEMM = torch.ops.pyquant.gemm.default
GEMM_INSTANCE = torch.ops.pyquant.gemm_instance.default
DEQUANTIZE = torch.ops.pyquant.dequantize.default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed_and_exact(variant: Variant, n: int = 33, k: int = 70) -> tuple[PackedWeight, torch.Tensor]:
    weight = random_weight(variant, n, k)
    return weight.pack(), exact_weight(weight)


def test_every_optional_tensor_is_set_and_unset() -> None:
    weights = [random_weight(v, 1, 64) for v in REPRESENTATIVES]
    for names, present in [
        (OPTIONAL, [w.tensors() for w in weights]),
        (OPTIONAL_ARGUMENTS, [w.pack().tensors() for w in weights]),
    ]:
        assert {name for tensors in present for name in tensors} == {"codes", "scales", *names}
        for name in names:
            assert any(name in tensors for tensors in present), name
            assert any(name not in tensors for tensors in present), name


def test_schemas() -> None:
    """Names, types and order of the arguments, which exported programs hold."""
    tensors = "Tensor codes, Tensor scales, Tensor? zeros, Tensor? codebook, Tensor? scale_data"
    integers = "SymInt spec, SymInt n, SymInt k"
    for op, arguments, result in [
        (GEMM, f"Tensor x, {tensors}, Tensor? bias, {integers}", "Tensor"),
        (GEMM_INSTANCE, f"Tensor x, {tensors}, Tensor? bias, {integers}, SymInt instance", "Tensor"),
        (DEQUANTIZE, f"{tensors}, {integers}, SymInt dtype", "Tensor"),
        (torch.ops.pyquant.pack.default, f"{tensors}, {integers}", "(Tensor, Tensor, Tensor)"),
        (torch.ops.pyquant.unpack.default, f"{tensors}, {integers}", "(Tensor, Tensor, Tensor)"),
    ]:
        schema = str(op._schema)
        assert schema == f"{op.name()}({arguments}) -> {result}".replace("SymInt", "int")


def test_spec() -> None:
    """format | scale type << 8 | zero type << 12 | group size << 16: stands in exported programs."""
    assert VARIANTS
    for variant in VARIANTS:
        for group_size in variant.group_sizes(70):
            weight = random_weight(variant, 33, 70, group_size)
            packed = weight.pack()
            spec = variant.format.id + 2**8 * variant.scale_type + 2**12 * variant.zero_type + 2**16 * group_size
            assert encode_spec(weight) == encode_spec(packed) == spec
            assert op_arguments(packed)[1] == (spec, 33, 70)


@representatives
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_opcheck_gemm(variant: Variant, has_bias: bool, requires_grad: bool) -> None:
    """Schema, autograd registration, fake tensors, and AOT dispatch with static and dynamic shapes."""
    packed, _ = packed_and_exact(variant)
    tensors, spec = op_arguments(packed)
    bias = torch.randn(33, requires_grad=requires_grad) if has_bias else None
    for shape in [(70,), (2, 3, 70)]:
        x = torch.randn(shape, requires_grad=requires_grad)
        results = torch.library.opcheck(GEMM, (x, *tensors, bias, *spec))
        assert len(results) >= 4
        assert set(results.values()) == {"SUCCESS"}


@each_dtype
def test_opcheck_gemm_dtypes_and_strides(dtype: torch.dtype) -> None:
    """The fake kernel promises dtype, shape and strides of the real one for any x, M = 0 included."""
    packed, _ = packed_and_exact(VARIANTS[0])
    tensors, spec = op_arguments(packed)
    base = torch.randn(6, 80).to(dtype)
    for x in (base[:, :70], base[:0, :70], torch.randn(70, 5).to(dtype).T, base[:1, :70].expand(4, 70)):
        torch.library.opcheck(GEMM, (x, *tensors, None, *spec))
        torch.library.opcheck(GEMM_INSTANCE, (x, *tensors, None, *spec, next(iter(gemm_instances()))))
        real = GEMM(x, *tensors, None, *spec)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = GEMM(mode.from_tensor(x), *tensors, None, *spec)
        assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())


@representatives
@each_dtype
def test_opcheck_dequantize(variant: Variant, dtype: torch.dtype) -> None:
    packed, w_exact = packed_and_exact(variant)
    tensors, spec = op_arguments(packed)
    code = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype]
    torch.library.opcheck(DEQUANTIZE, (*tensors, *spec, code))
    out = dequantize(packed, dtype)
    assert (out.dtype, out.shape) == (dtype, (33, 70))
    assert torch.allclose(out.double(), w_exact, rtol=float(torch.finfo(dtype).eps), atol=1e-3)


# ---- gradients


@representatives
@pytest.mark.parametrize("shape", [(70,), (5, 70), (2, 3, 70), (0, 70)], ids=str)
def test_gradients_are_those_of_the_dequantized_model(variant: Variant, shape: tuple[int, ...]) -> None:
    """x and bias, against F.linear in float64."""
    packed, w_exact = packed_and_exact(variant)
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(33, requires_grad=True)
    y = linear(x, packed, bias)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    x64, bias64 = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    F.linear(x64, w_exact, bias64).backward(upstream.double())
    assert x.grad is not None
    assert bias.grad is not None
    assert_within_budget(x.grad, upstream, w_exact.T)
    assert torch.allclose(bias.grad.double(), bias64.grad, rtol=1e-6, atol=1e-6)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5 * float(w_exact.abs().max()))


@each_dtype
def test_gradients_have_the_dtype_of_x(dtype: torch.dtype) -> None:
    packed, w_exact = packed_and_exact(VARIANTS[0])
    x = torch.randn(5, 70).to(dtype).requires_grad_()
    bias = torch.randn(33).to(dtype).requires_grad_()
    y = linear(x, packed, bias)
    upstream = torch.randn(5, 33).to(dtype)
    y.backward(upstream)
    assert x.grad is not None
    assert bias.grad is not None
    assert x.grad.dtype == bias.grad.dtype == y.dtype == dtype
    assert_within_budget(x.grad, upstream, w_exact.T)


def test_only_what_asks_gets_a_gradient() -> None:
    packed, _ = packed_and_exact(VARIANTS[0])
    for wants_x, wants_bias in [(True, False), (False, True), (False, False)]:
        x = torch.randn(5, 70, requires_grad=wants_x)
        bias = torch.randn(33, requires_grad=wants_bias)
        y = linear(x, packed, bias)
        assert y.requires_grad == (wants_x or wants_bias)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == wants_x
        assert (bias.grad is not None) == wants_bias


def test_gradients_of_odd_upstreams() -> None:
    """An expanded gradient (of a sum), a transposed one, and two calls that share x."""
    packed, w_exact = packed_and_exact(VARIANTS[0])
    x = torch.randn(5, 70, requires_grad=True)
    linear(x, packed).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad.double(), w_exact.sum(0).expand(5, 70), rtol=1e-4, atol=1e-5)
    x.grad = None
    (linear(x, packed).T.contiguous() * torch.arange(5)).sum().backward()
    assert torch.allclose(x.grad.double(), torch.arange(5)[:, None] * w_exact.sum(0), rtol=1e-4, atol=1e-4)
    x.grad = None
    (linear(x, packed) + linear(x, packed)).sum().backward()
    assert torch.allclose(x.grad.double(), 2 * w_exact.sum(0).expand(5, 70), rtol=1e-4, atol=1e-4)


def test_no_dequantized_copy_is_kept_for_backward() -> None:
    packed, _ = packed_and_exact(VARIANTS[0], 64, 128)
    saved: list[torch.Tensor] = []

    def pack_hook(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        linear(torch.randn(3, 128, requires_grad=True), packed)
    pointers = {t.data_ptr() for t in packed.tensors().values()}
    assert saved
    assert all(t.data_ptr() in pointers for t in saved)


# ---- compile and export


@representatives
def test_compile_full_graph_with_dynamic_tokens(variant: Variant) -> None:
    """One graph for all M: no graph break, no recompile."""
    packed, w_exact = packed_and_exact(variant)
    bias = torch.randn(33)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def f(x: torch.Tensor) -> torch.Tensor:
        return linear(x.relu(), packed, bias) * 2

    for i, m in enumerate((5, 2, 9, 64, 17)):
        x = torch.randn(m, 70)
        if i == 0:
            torch._dynamo.mark_dynamic(x, 0)
        y = f(x)
        assert torch.equal(y, linear(x.relu(), packed, bias) * 2)
        assert_within_budget(y / 2, x.relu(), w_exact, bias)
    assert counter.frame_count == 1


def test_compile_of_a_module_with_gradients() -> None:
    """Forward and backward as graphs; parameters train."""
    layer = QuantLinear.from_quantized(make_weight(VARIANTS[0], 33, 70), torch.randn(33, requires_grad=True))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (5, 2, 9):
            x = torch.randn(m, 70, requires_grad=True)
            compiled(x).square().sum().backward()
            got = x.grad, layer.bias.grad
            x.grad = layer.bias.grad = None
            layer(x).square().sum().backward()
            assert torch.equal(got[0], x.grad)
            assert torch.equal(got[1], layer.bias.grad)
            layer.bias.grad = None


def test_compile_with_the_default_backend() -> None:
    """Two calls in a row and nothing else: nothing for Inductor to compile in C++, which would take half a minute."""
    first, _ = packed_and_exact(VARIANTS[0], 33, 70)
    second, _ = packed_and_exact(VARIANTS[0], 5, 33)
    f = torch.compile(lambda x: linear(linear(x, first), second), fullgraph=True)
    for x in (torch.randn(3, 70), torch.randn(70, 3).T):
        assert torch.equal(f(x), linear(linear(x, first), second))


@representatives
def test_export_with_dynamic_tokens(variant: Variant) -> None:
    weight = make_weight(variant, 33, 70)
    layer = QuantLinear.from_quantized(weight, torch.randn(33))
    tokens = torch.export.Dim("tokens", min=1, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 70),), dynamic_shapes={"x": {0: tokens}})
    assert any(node.target is GEMM for node in program.graph.nodes)
    for m in (1, 5, 70):
        x = torch.randn(m, 70)
        assert torch.equal(program.module()(x), layer(x))


def test_inference_mode_and_no_grad() -> None:
    """inference_mode and no_grad give the same bits as the autograd path."""
    packed, _ = packed_and_exact(VARIANTS[0])
    x = torch.randn(5, 70)
    expected = linear(x, packed)
    with torch.inference_mode():
        assert torch.equal(linear(x, packed), expected)
    with torch.no_grad():
        assert torch.equal(linear(x.requires_grad_(), packed), expected)


def test_autocast_leaves_the_operator_alone() -> None:
    """The operator has no autocast rule: y has x's dtype, as given. Documented, so that a change is a decision."""
    packed, _ = packed_and_exact(VARIANTS[0])
    bias = torch.randn(33)
    x = torch.randn(5, 70)
    half = linear(x.bfloat16(), packed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, packed, bias)
        assert torch.equal(linear(x.bfloat16(), packed), half)
        with pytest.raises(RuntimeError, match=r"gemm: bias: expected .*BFloat16, got .*Float"):
            linear(x.bfloat16(), packed, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x, packed, bias))


# ---- errors


def call(packed: PackedWeight, x: Any = None, bias: Any = None, **changes: Any) -> torch.Tensor:
    """The operator with some of its arguments replaced, by name; fields of the weight change the spec."""
    tensors, spec = op_arguments(packed)
    fields = {name: changes.pop(name) for name in ("format", "scale_type", "zero_type", "group_size") & changes.keys()}
    if fields:
        changes["spec"] = changed_spec(packed, **fields)
    names = [a.name for a in GEMM._schema.arguments]
    arguments = dict(zip(names, (torch.randn(2, 70) if x is None else x, *tensors, bias, *spec), strict=True))
    assert changes.keys() <= arguments.keys()
    return GEMM(**{**arguments, **changes})


def changed_spec(packed: PackedWeight, **fields: int) -> int:
    """The spec of a weight with other fields, which must fit their 8, 4 and 4 bits; the group size may be any."""
    old = {"format": packed.format.id, "scale_type": packed.scale_type, "zero_type": packed.zero_type}
    new = {**old, "group_size": packed.group_size, **fields}
    assert 0 <= new["format"] < 2**8
    assert 0 <= new["scale_type"] < 2**4
    assert 0 <= new["zero_type"] < 2**4
    return new["format"] + 2**8 * new["scale_type"] + 2**12 * new["zero_type"] + 2**16 * new["group_size"]


def variant_with(tensor: str) -> Variant:
    return next(v for v in VARIANTS if tensor in random_weight(v, 1, 64).tensors())


PLAIN = VARIANTS[0]
X_ERRORS: list[tuple[str, Callable[[], Any], str]] = [
    ("K", lambda: torch.randn(2, 71), r"gemm: x has K=71, the weight has K=70"),
    ("transposed", lambda: torch.randn(70, 2), r"gemm: x has K=2, the weight has K=70"),
    ("scalar", lambda: torch.tensor(1.0), r"gemm: x has a scalar, the weight has K=70"),
    ("empty", lambda: torch.randn(2, 0), r"gemm: x has K=0, the weight has K=70"),
    ("int64", lambda: torch.zeros(2, 70, dtype=torch.int64), r"gemm: x: expected Float, Half or BFloat16, got Long"),
    ("int8", lambda: torch.zeros(2, 70, dtype=torch.int8), r"gemm: x: expected Float, Half or BFloat16, got Char"),
    ("bool", lambda: torch.zeros(2, 70, dtype=torch.bool), r"gemm: x: expected Float, Half or BFloat16, got Bool"),
    ("double", lambda: torch.zeros(2, 70).double(), r"gemm: x: expected Float, Half or BFloat16, got Double"),
    ("no tokens", lambda: torch.zeros(0, 70).double(), r"gemm: x: expected Float, Half or BFloat16, got Double"),
]


@pytest.mark.parametrize(("make_x", "message"), [e[1:] for e in X_ERRORS], ids=[e[0] for e in X_ERRORS])
def test_wrong_x(make_x: Callable[[], torch.Tensor], message: str) -> None:
    packed, _ = packed_and_exact(PLAIN)
    with pytest.raises(RuntimeError, match=message):
        call(packed, make_x())
    with pytest.raises(RuntimeError, match=message):
        linear(make_x(), packed)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.zeros(32), r"gemm: bias: expected shape \[N=33\], got 32 values in 1 dimensions"),
        (torch.zeros(1, 33), r"gemm: bias: expected shape \[N=33\], got 33 values in 2 dimensions"),
        (torch.tensor(1.0), r"gemm: bias: expected shape \[N=33\], got 1 values in 0 dimensions"),
        (torch.zeros(33).half(), r"gemm: bias: expected .*Float, got .*Half"),
        (torch.zeros(33, dtype=torch.int64), r"gemm: bias: expected .*Float, got .*Long"),
    ],
    ids=["short", "matrix", "scalar", "half", "int64"],
)
@pytest.mark.parametrize("tokens", [2, 0])
def test_wrong_bias(bias: torch.Tensor, message: str, tokens: int) -> None:
    packed, _ = packed_and_exact(PLAIN)
    with pytest.raises(RuntimeError, match=message):
        call(packed, torch.randn(tokens, 70), bias)


def test_bias_of_any_stride() -> None:
    """F.linear takes a slice of a larger tensor as bias, and an expanded scalar."""
    packed, _ = packed_and_exact(PLAIN)
    x = torch.randn(2, 70)
    for bias in (torch.randn(66)[::2], torch.randn(1).expand(33), torch.randn(40)[3:36]):
        assert torch.equal(linear(x, packed, bias), linear(x, packed, bias.clone()))


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("codes", "codes"),
        ("scales", "scales"),
        ("zeros", "zeros"),
        ("codebook", "codebook"),
        ("scale_data", "nested_map"),
        ("scale_data", "tensor_scale"),
    ],
)
def test_wrong_weight_tensors(tensor: str, part: str) -> None:
    """Each tensor of a wrong size, dtype, or missing: the message names it, with what was expected and what came."""
    packed, _ = packed_and_exact(variant_with(part), 300, 128)
    good = getattr(packed, tensor)
    flat = good.reshape(-1)
    x = torch.randn(2, 128)
    size = rf"^gemm: (weight\.)?{tensor}(_bytes)?: expected \d+( values)?, got \d+"
    for wrong in (torch.cat([flat, flat[:1]]), flat[:-1]):
        with pytest.raises(RuntimeError, match=size):
            call(packed, x, **{tensor: wrong})
    with pytest.raises(RuntimeError, match=rf"^gemm: {tensor}: expected .*, got .*Double"):
        call(packed, x, **{tensor: flat.double()})
    if flat.numel() > 1:
        with pytest.raises(RuntimeError, match=rf"^gemm: {tensor}: expected a contiguous .*, got .*non-contiguous"):
            call(packed, x, **{tensor: torch.stack([flat, flat], dim=1)[:, 0]})
    if tensor in OPTIONAL_ARGUMENTS and not (tensor == "codebook" and not packed.format.needs_codebook):
        # Of scale_data, the message names the first part that the format asks for.
        with pytest.raises(RuntimeError, match=rf"^gemm: weight\.{part}: expected a pointer, got NULL"):
            call(packed, x, **{tensor: None})


@pytest.mark.parametrize(
    ("tensor", "numel", "message"),
    [
        ("zeros", None, r"weight\.zeros: expected NULL for this format.*, got a pointer"),
        ("scale_data", 1, r"weight\.tensor_scale: expected NULL for this format.*, got a pointer"),
        ("scale_data", 1 + 256 + 1, r"scale_data: expected \d+ values, got 258"),
    ],
)
def test_unexpected_weight_tensors(tensor: str, numel: int | None, message: str) -> None:
    packed, _ = packed_and_exact(PLAIN)
    extra = torch.zeros(numel or packed.scales.numel())
    with pytest.raises(RuntimeError, match="^gemm: " + message):
        call(packed, **{tensor: extra})


def test_unexpected_codebook() -> None:
    """A codebook format may bring its own; an integer format may not."""
    packed, _ = packed_and_exact(next(v for v in VARIANTS if v.format.name == "int4"))
    with pytest.raises(RuntimeError, match=r"^gemm: weight\.codebook: expected NULL.*, got a pointer"):
        call(packed, codebook=torch.zeros(16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, r"expected 0\.\.11, got 99"),
        ({"format": 12}, r"expected 0\.\.11, got 12"),
        ({"format": 255}, r"expected 0\.\.11, got 255"),
        ({"scale_type": 7}, r"scale_type: nf4 expects fp32 or .*, got 7"),
        ({"scale_type": 15}, r"scale_type: nf4 expects fp32 or .*, got 15"),
        ({"scale_type": 5}, r"scale_type: nf4 expects fp32 or .*, got e8m0"),
        ({"zero_type": 9}, r"zero_type: nf4 expects none, got 9"),
        ({"zero_type": 15}, r"zero_type: nf4 expects none, got 15"),
        ({"zero_type": 1}, r"zero_type: nf4 expects none, got integer"),
        ({"group_size": 48}, r"group_size: nf4 expects 32 or 64 or .*, got 48 \(K=70\)"),
        ({"group_size": 0}, r"group_size: nf4 expects .*, got 0"),
        ({"group_size": -64}, r"group_size: nf4 expects .*, got -64"),
        ({"n": 0}, r"expected N and K in 1\..*, got N=0"),
        ({"n": -5}, r"expected N and K in 1\..*, got N=-5"),
        ({"n": 65}, r"codes_bytes: expected \d+, got \d+"),
        ({"n": 2**40}, r"expected N and K in 1\..*, got N=1099511627776"),
        ({"k": 2**40}, r"expected N and K in 1\..*, got N=33, K=1099511627776"),
        ({"k": 0}, r"expected N and K in 1\..*, got N=33, K=0"),
        ({"k": -70}, r"expected N and K in 1\..*, got N=33, K=-70"),
        ({"k": 71}, r"x has K=70, the weight has K=71"),
    ],
    ids=str,
)
def test_wrong_integers(change: dict[str, int], message: str) -> None:
    packed, _ = packed_and_exact(PLAIN)
    with pytest.raises(RuntimeError, match=rf"^gemm: (weight(\.\w+)?: )?(weight\.)?{message}"):
        call(packed, **change)


def test_errors_carry_the_name_of_their_operator() -> None:
    """Wrong integers and wrong tensors, the integers first."""
    packed, _ = packed_and_exact(PLAIN)
    tensors, (spec, n, k) = op_arguments(packed)
    wrong = (tensors[0].double(), *tensors[1:])
    x = torch.randn(2, 70)
    for name, op, before, after in [
        ("gemm", GEMM, (x,), lambda *integers: (None, *integers)),
        ("dequantize", DEQUANTIZE, (), lambda *integers: (*integers, 0)),
        ("pack", torch.ops.pyquant.pack.default, (), lambda *integers: integers),
        ("unpack", torch.ops.pyquant.unpack.default, (), lambda *integers: integers),
    ]:
        with pytest.raises(RuntimeError, match=rf"^{name}: weight.*, got N=0"):
            op(*before, *wrong, *after(spec, 0, k))
        with pytest.raises(RuntimeError, match=rf"^{name}: weight\.group_size: .*, got 48"):
            op(*before, *wrong, *after(changed_spec(packed, group_size=48), n, k))
        with pytest.raises(RuntimeError, match=rf"^{name}: codes: expected .*Byte, got .*Double"):
            op(*before, *wrong, *after(spec, n, k))
        with pytest.raises(RuntimeError, match=rf"^{name}: weight\.codes_bytes: expected \d+, got 1$"):
            op(*before, tensors[0][:1], *tensors[1:], *after(spec, n, k))


@pytest.mark.parametrize("name", ["n", "k", "group_size"])
def test_integers_do_not_wrap(name: str) -> None:
    """2^32 + a valid value is no valid value."""
    packed, _ = packed_and_exact(PLAIN)
    valid = {"n": 33, "k": 70, "group_size": 64}[name]
    for value in (2**32 + valid, valid - 2**32):
        with pytest.raises(RuntimeError, match="^gemm: weight.*" + re.escape(str(value))):
            call(packed, **{name: value})


def test_wrong_dtype_of_dequantize() -> None:
    packed, _ = packed_and_exact(PLAIN)
    with pytest.raises(TypeError, match=r"dequantize: dtype: expected float32, float16 or bfloat16, got torch.float64"):
        packed.dequantize(torch.float64)
    tensors, spec = op_arguments(packed)
    for code in (-1, 3, 2**32):
        with pytest.raises(RuntimeError, match=f"dequantize: dtype: expected 0, 1 or 2, got {code}"):
            DEQUANTIZE(*tensors, *spec, code)


def test_an_error_leaves_the_next_call_alone() -> None:
    packed, w_exact = packed_and_exact(PLAIN)
    x = torch.randn(2, 70)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="gemm: x has K=3"):
            linear(torch.randn(2, 3), packed)
        assert_within_budget(linear(x, packed), x, w_exact)


@pytest.mark.parametrize("fails", [False, True], ids=["a call", "a call that fails"])
def test_a_call_without_gradients_leaves_autograd_alone(fails: bool) -> None:
    packed, _ = packed_and_exact(PLAIN)
    before = torch._C._dispatch_tls_local_exclude_set()
    with torch.no_grad(), pytest.raises(RuntimeError) if fails else nullcontext():
        linear(torch.randn(2, 3 if fails else 70), packed)
    assert torch._C._dispatch_tls_local_exclude_set() == before
    x = torch.randn(2, 70, requires_grad=True)
    linear(x * 2, packed).sum().backward()
    assert x.grad is not None
    with torch._C._AutoDispatchBelowAutograd():  # as inside another operator
        linear(torch.randn(2, 70), packed)
        assert torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def test_fake_tensors_see_a_wrong_k() -> None:
    packed, _ = packed_and_exact(PLAIN)
    with pytest.raises(RuntimeError, match=r"gemm: x has shape .*71.*the weight has K=70"):
        torch.compile(lambda x: linear(x, packed), backend="aot_eager", fullgraph=True)(torch.randn(2, 71))
