"""bitsandbytes' functions under its signatures: every storage, orientation and absmax; the cache; gradients."""

from __future__ import annotations

import gc
import re
import warnings
import weakref
from collections.abc import Iterator

import pytest
import torch
from bitsandbytes_cases import QuantState, dense, quantize_4bit
from conftest import assert_within_budget, each_dtype

from pyquant import _packed_cache
from pyquant._quant_state import stored_codes, weight_of_quant_state
from pyquant.functional import gemm_4bit, gemv_4bit, matmul_4bit

N, K = 96, 128
each_type = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
each_absmax = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def _deprecations_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)
        yield


def packings(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by one with each weight that is packed."""
    made: list[torch.Tensor] = []

    def counted(stored, state, prefix):
        made.append(stored)
        return weight_of_quant_state(stored, state, prefix)

    monkeypatch.setattr(_packed_cache, "weight_of_quant_state", counted)
    return made


def op_arguments(B: torch.Tensor, state: QuantState) -> tuple:
    """Those of ``torch.ops.bitsandbytes.gemm_4bit`` behind A, and its keyword arguments."""
    absmax, nested = state.absmax, {}
    if state.nested:
        absmax = state.state2.absmax
        nested = {"absmax_8bit": state.absmax, "absmax_code": state.state2.code, "absmax_offset": state.offset}
    return (B, state.shape, absmax, state.blocksize, state.quant_type), nested


@each_type
@each_absmax
@each_dtype
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: str(s).removeprefix("torch."))
def test_all_functions(quant_type: str, nested: bool, dtype: torch.dtype, storage: torch.dtype) -> None:
    B, state = quantize_4bit(torch.randn(N, K), quant_type, nested=nested, storage=storage)
    exact = dense(B, state).double()
    x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(N).to(dtype)
    y = matmul_4bit(x, B, state, bias=bias)
    assert_within_budget(y, x, exact, bias)
    assert torch.equal(matmul_4bit(x, B.t(), state, bias=bias), y)
    arguments, parts = op_arguments(B, state)
    assert torch.equal(gemm_4bit(x, *arguments, bias=bias, **parts), y)
    without = matmul_4bit(x, B, state)
    assert_within_budget(without, x, exact)
    assert torch.equal(gemv_4bit(x, B.t(), state=state), without)


@pytest.mark.parametrize(("n", "k", "blocksize"), [(33, 70, 64), (3, 5, 32), (5, 200, 4096)])
@each_absmax
def test_blocks_across_rows_and_odd_sizes(n: int, k: int, blocksize: int, nested: bool) -> None:
    B, state = quantize_4bit(torch.randn(n, k), "nf4", blocksize, nested)
    x = torch.randn(4, k)
    assert_within_budget(matmul_4bit(x, B, state), x, dense(B, state).double())
    assert torch.equal(stored_codes(weight_of_quant_state(B, state)), B.view(-1))


def test_out_and_no_rows() -> None:
    B, state = quantize_4bit(torch.randn(N, K))
    x = torch.randn(3, K)
    out = torch.empty(3, N)
    assert matmul_4bit(x, B, state, out=out) is out
    assert torch.equal(out, matmul_4bit(x, B, state))
    assert gemv_4bit(x[:1], B, out[:1], state=state).data_ptr() == out.data_ptr()
    assert matmul_4bit(x[:0], B, state).shape == (0, N)
    with pytest.raises(ValueError, match=re.escape("matmul_4bit: out: expected torch.float32 [3, 96], got")):
        matmul_4bit(x, B, state, out=torch.empty(3, N, dtype=torch.float16))


@each_dtype
def test_weight_quantized_as_k_by_n(dtype: torch.dtype) -> None:
    B, state = quantize_4bit(torch.randn(K, N))
    x, bias = torch.randn(3, K).to(dtype), torch.randn(N).to(dtype)
    with pytest.warns(DeprecationWarning, match=re.escape("quantized as [K, N] (quant_state.shape=[128, 96])")) as got:
        y = matmul_4bit(x, B, state, bias=bias)
    assert got[0].filename == __file__
    assert_within_budget(y, x, dense(B, state).double().t(), bias)


def test_square_weight_is_n_by_k() -> None:
    B, state = quantize_4bit(torch.randn(K, K))
    x = torch.randn(3, K)
    assert_within_budget(matmul_4bit(x, B.t(), state), x, dense(B, state).double())


@each_absmax
def test_gradients(nested: bool) -> None:
    """Of A and bias, as of the dequantized weight; the weight is saved packed."""
    B, state = quantize_4bit(torch.randn(N, K), nested=nested)
    x, bias, grad = torch.randn(3, K, requires_grad=True), torch.randn(N, requires_grad=True), torch.randn(3, N)
    saved: list[int] = []

    def save(t: torch.Tensor) -> torch.Tensor:
        saved.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
        y = matmul_4bit(x, B, state, bias=bias)
    assert saved
    assert max(saved) < N * K
    got = torch.autograd.grad(y, (x, bias), grad)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense(B, state), bias), (x, bias), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = packings(monkeypatch)
    B, state = quantize_4bit(torch.randn(N, K), nested=True)
    for view in (B, B.t(), B.view(-1), B, B[:]):
        matmul_4bit(torch.randn(2, K), view, state)
    assert len(made) == 1
    arguments, parts = op_arguments(B, state)
    gemm_4bit(torch.randn(2, K), *arguments, **parts)
    count = len(made)  # the codebook is another tensor than the state's: once more
    for _ in range(3):
        gemm_4bit(torch.randn(2, K), *arguments, **parts)
    assert len(made) == count


def test_parts_of_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps the weights of several layers in one tensor."""
    made = packings(monkeypatch)
    pairs = [quantize_4bit(torch.randn(N, K)) for _ in range(2)]
    both = torch.cat([B for B, _ in pairs])
    half = both.shape[0] // 2
    for _ in range(2):
        for i, (_, state) in enumerate(pairs):
            x = torch.randn(2, K)
            y = matmul_4bit(x, both[i * half : (i + 1) * half].t(), state)
            assert_within_budget(y, x, dense(*pairs[i]).double())
    assert len(made) == 2


@pytest.mark.parametrize("part", ["B", "absmax", "nested_absmax", "offset", "replaced"])
def test_changes_are_noticed(part: str) -> None:
    B, state = quantize_4bit(torch.randn(N, K), nested=True)
    x = torch.randn(3, K)
    before = matmul_4bit(x, B, state)
    if part == "B":
        B.copy_(B ^ 0x11)
    elif part == "absmax":
        state.absmax.add_(1)
    elif part == "nested_absmax":
        state.state2.absmax.mul_(2)
    elif part == "offset":
        state.offset.add_(1)
    else:
        state.absmax = state.absmax.flip(0)
    y = matmul_4bit(x, B, state)
    assert not torch.equal(y, before)
    assert_within_budget(y, x, dense(B, state).double())


def test_freed_with_the_tensor() -> None:
    B, state = quantize_4bit(torch.randn(N, K))
    matmul_4bit(torch.randn(2, K), B, state)
    tensor = weakref.ref(B)
    entry = next(e for e in _packed_cache._entries.values() if e.views[0].shows(B))
    packed = weakref.ref(entry.weight)
    del B, entry
    gc.collect()
    assert tensor() is None
    assert packed() is None


def test_inference_tensors() -> None:
    """They have no version counter."""
    with torch.inference_mode():
        B, state = quantize_4bit(torch.randn(N, K))
        x = torch.randn(3, K)
        y = matmul_4bit(x, B, state)
        assert torch.equal(matmul_4bit(x, B, state), y)
        assert_within_budget(y, x, dense(B, state).double())


def test_compiles() -> None:
    """With a graph break, around the cache."""
    B, state = quantize_4bit(torch.randn(N, K))
    x = torch.randn(3, K)
    compiled = torch.compile(lambda x: matmul_4bit(x * 2, B, state) + 1, backend="eager")
    torch.testing.assert_close(compiled(x), matmul_4bit(x * 2, B, state) + 1)


def test_errors() -> None:
    B, state = quantize_4bit(torch.randn(N, K), nested=True)
    x = torch.randn(3, K)
    with pytest.raises(ValueError, match="matmul_4bit: quant_state: expected the QuantState of B, got None"):
        matmul_4bit(x, B, None)
    with pytest.raises(ValueError, match="gemv_4bit: state: expected"):
        gemv_4bit(x, B)
    with pytest.raises(ValueError, match="matmul_4bit: A has K=100, the weight has K=128"):
        matmul_4bit(torch.randn(3, 100), B, state)
    with pytest.raises(ValueError, match=r"matmul_4bit: B, quant_state: .*weight: expected 6144 bytes"):
        matmul_4bit(x, B[:-1], state)
    arguments, parts = op_arguments(B, state)
    with pytest.raises(ValueError, match="gemm_4bit: expected all of absmax_8bit"):
        gemm_4bit(x, *arguments, absmax_8bit=parts["absmax_8bit"])
    with pytest.raises(ValueError, match=re.escape("gemm_4bit: shapeB: expected [N, 128], got [128, 96]")):
        gemm_4bit(x, arguments[0], (K, N), *arguments[2:], **parts)
    with pytest.raises(ValueError, match="gemm_4bit: quant_type: expected 'nf4' or 'fp4', got 'int4'"):
        gemm_4bit(x, *arguments[:-1], "int4", **parts)
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="rearranged it for its CPU kernel"):
        matmul_4bit(x, B.clone(), state)
    state.packing_format_for_cpu = False
    state.state2.absmax[0] = torch.nan
    with pytest.raises(ValueError, match=r"weight\.nested_absmax: expected finite values"):
        matmul_4bit(x, B, state)
    state.shape = None
    with pytest.raises(ValueError, match=re.escape("matmul_4bit: quant_state.shape: expected [N, K], got None")):
        matmul_4bit(x, B, state)


@each_type
@each_absmax
@pytest.mark.parametrize("storage", STORAGES, ids=lambda s: str(s).removeprefix("torch."))
def test_against_bitsandbytes(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    """The real package: its weights, its results, its calls."""
    bnb = pytest.importorskip("bitsandbytes")
    functional = pytest.importorskip("bitsandbytes.functional")
    B, state = functional.quantize_4bit(
        torch.randn(N, K), quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    )
    weight = functional.dequantize_4bit(B, state).double()
    x, bias = torch.randn(3, K), torch.randn(N)
    for view in (B, B.t()):
        y = matmul_4bit(x, view, state, bias=bias)
        assert_within_budget(y, x, weight, bias)
        torch.testing.assert_close(y, bnb.matmul_4bit(x, view, state, bias=bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(stored_codes(weight_of_quant_state(B, state)), B.view(-1).view(torch.uint8))
    arguments, parts = op_arguments(B, state)
    theirs = torch.ops.bitsandbytes.gemm_4bit(x, *arguments, bias=bias, **parts)
    torch.testing.assert_close(gemm_4bit(x, *arguments, bias=bias, **parts), theirs, rtol=1e-5, atol=1e-5)
