"""What the test modules share: the format table as parameters, random weights, exact references, the error budget.

References are written from the documents (formats, packed layout, C header), not from the code under test.
"""

from __future__ import annotations

import os

# Threads that spin while they wait make small calls fifty times slower where tests share the cores. Read when a
# runtime is loaded, so before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import ctypes
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings

from pyquant import PackedWeight, QuantizedWeight, _library, quantize
from pyquant.codes import pack_codes
from pyquant.formats import FORMATS, Encoding, Format, ScaleType, ZeroType
from pyquant.ops import op_arguments

# The same examples in every run, so that a failure is a failure for everyone.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLOAT_DTYPES = {ScaleType.FP32: torch.float32, ScaleType.FP16: torch.float16, ScaleType.BF16: torch.bfloat16}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, torch sees none"))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Any]:
    """``torch.set_num_threads``, undone at the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---- the format table as parameters


@dataclass(frozen=True)
class Variant:
    """An allowed combination of format, scale type and zero type."""

    format: Format
    scale_type: ScaleType
    zero_type: ZeroType

    def __str__(self) -> str:
        zero = "" if self.zero_type is ZeroType.NONE else f"-{self.zero_type.name.lower()}"
        return f"{self.format.name}-{self.scale_type.name.lower()}{zero}"

    def arguments(self) -> dict[str, Any]:
        """Those of :func:`pyquant.quantize` that ask for this combination."""
        codebook = user_codebook(self.format) if self.format.needs_codebook else None
        return {"scale_type": self.scale_type, "zero_type": self.zero_type, "codebook": codebook}

    def group_sizes(self, k: int) -> list[int]:
        """Allowed group sizes for rows of ``k``."""
        sizes = self.format.group_sizes or tuple(dict.fromkeys((16, 32, 64, 128, 256, k)))
        assert all(self.format.allows_group(g, k) for g in sizes)
        return list(sizes)


VARIANTS = [Variant(f, s, z) for f in FORMATS.values() for s in f.scale_types for z in f.zero_types]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_format = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def user_codebook(fmt: Format) -> torch.Tensor:
    """A codebook in no order, with no symmetry, with a zero (else a nested scale has no way to say zero)."""
    values = torch.randn(fmt.levels, generator=torch.Generator().manual_seed(7)).clamp(-1, 1)
    values[3] = 0.0
    return values


def rng(seed: int) -> torch.Generator:
    """Of weights: another stream than the activations', which would else repeat the weight's values."""
    return torch.Generator().manual_seed(10**6 + seed)


def make_weight(variant: Variant, n: int, k: int, group_size: int | None = None, seed: int = 0) -> QuantizedWeight:
    """A normal random matrix, quantized."""
    return quantize(torch.randn(n, k, generator=rng(seed)), variant.format.name, group_size, **variant.arguments())


def random_weight(variant: Variant, n: int, k: int, group_size: int | None = None, seed: int = 0) -> QuantizedWeight:
    """Random codes, scales and zeros: what a file may hold, not only what the quantizer makes."""
    fmt, g = variant.format, rng(seed)
    group_size = group_size or fmt.group_size or k
    flat = fmt.flat_blocks and k % group_size != 0
    shape = (-(-n * k // group_size),) if flat else (n, -(-k // group_size))
    blocks = int(np.prod(shape))

    def floats(low: float, high: float, size: tuple[int, ...]) -> torch.Tensor:
        return low + (high - low) * torch.rand(size, generator=g)

    parts: dict[str, torch.Tensor] = {}
    if variant.scale_type in FLOAT_DTYPES:
        scales = floats(0.01, 0.1, shape).to(FLOAT_DTYPES[variant.scale_type])
    else:
        # E4M3: positive and no NaN. E8M0: 2^-10 .. 2^6, so that fp16 can hold the result.
        low, high = {ScaleType.E4M3: (0, 0x7F), ScaleType.E8M0: (117, 134)}.get(variant.scale_type, (0, 256))
        scales = torch.randint(low, high, shape, dtype=torch.uint8, generator=g)
    if variant.scale_type is ScaleType.NESTED:
        parts["nested_map"] = floats(-1, 1, (256,))
        parts["nested_absmax"] = floats(0, 1, (-(-blocks // 256),))
        parts["nested_offset"] = floats(0, 1, ())
    if variant.zero_type is ZeroType.INTEGER:
        parts["zeros"] = torch.randint(0, 17, shape, dtype=torch.uint8, generator=g)  # GPTQ v1 files hold 16
    elif variant.zero_type is ZeroType.FLOAT:
        parts["zeros"] = floats(-2, 17, shape).to(scales.dtype)
    if fmt.needs_codebook:
        parts["codebook"] = user_codebook(fmt)
    if fmt.tensor_scale:
        parts["tensor_scale"] = floats(0.001, 0.01, ())
    codes = torch.randint(0, fmt.levels, (n, k), dtype=torch.uint8, generator=g)
    weight = QuantizedWeight(
        fmt, n, k, group_size, variant.scale_type, variant.zero_type, pack_codes(codes, fmt.bits), scales, **parts
    )
    weight.check()
    return weight


# ---- references


def exact_codes(weight: QuantizedWeight) -> np.ndarray:
    """Codes [N, K], read bit by bit."""
    bits = weight.format.bits
    stream = np.unpackbits(weight.codes.numpy(), axis=1, bitorder="little")[:, : weight.k * bits]
    return stream.reshape(weight.n, weight.k, bits).astype(np.int64) @ (1 << np.arange(bits))


def group_index(weight: QuantizedWeight) -> np.ndarray:
    """Which scale, in the order of storage, belongs to each weight: [N, K]."""
    n, k, size = weight.n, weight.k, weight.group_size
    if weight.format.flat_blocks and k % size != 0:
        return np.arange(n * k).reshape(n, k) // size
    return np.arange(n)[:, None] * -(-k // size) + np.arange(k)[None, :] // size


def exact_scales(weight: QuantizedWeight) -> np.ndarray:
    """The scales as they are stored, in float64, flat: the formulas of each type on the bits."""
    kind = weight.scale_type
    if kind in FLOAT_DTYPES:
        return weight.scales.double().numpy().reshape(-1)
    byte = weight.scales.numpy().reshape(-1).astype(np.int64)
    if kind is ScaleType.NESTED:
        assert weight.nested_map is not None
        assert weight.nested_absmax is not None
        assert weight.nested_offset is not None
        second = weight.nested_absmax.double().numpy()[np.arange(byte.size) // 256]
        return weight.nested_map.double().numpy()[byte] * second + float(weight.nested_offset)
    if kind is ScaleType.E4M4:
        exponent, mantissa = byte >> 4, byte & 15
        return np.where(exponent > 0, 2.0 ** (exponent - 11) * (1 + mantissa / 16), 2.0**-14 * mantissa)
    if kind is ScaleType.E4M3:
        exponent, mantissa = byte >> 3 & 15, byte & 7
        value = np.where(exponent > 0, 2.0 ** (exponent - 7) * (1 + mantissa / 8), 2.0**-9 * mantissa)
        assert weight.tensor_scale is not None
        return np.where(byte & 128, -value, value) * float(weight.tensor_scale)
    assert kind is ScaleType.E8M0
    return 2.0 ** (byte - 127.0)


def code_values(weight: QuantizedWeight) -> np.ndarray:
    """What each of the 2^bits codes stands for, float64."""
    fmt, codes = weight.format, np.arange(weight.format.levels)
    if fmt.encoding is Encoding.SIGNED:
        return np.where(codes >= fmt.levels // 2, codes - fmt.levels, codes).astype(np.float64)
    if fmt.encoding is Encoding.UNSIGNED:
        return codes.astype(np.float64)
    return np.asarray(fmt.codebook if weight.codebook is None else weight.codebook.tolist(), np.float64)


def exact_weight(weight: QuantizedWeight) -> torch.Tensor:
    """W_exact [N, K]: the format's decode and scale in float64."""
    values, index = code_values(weight)[exact_codes(weight)], group_index(weight)
    if weight.zeros is not None:
        values = values - weight.zeros.double().numpy().reshape(-1)[index]
    return torch.from_numpy(values * exact_scales(weight)[index])


def assert_within_budget(
    y: torch.Tensor, x: torch.Tensor, w_exact: torch.Tensor, bias: torch.Tensor | None = None, *, dense: bool = False
) -> None:
    """The numerics contract of y = x @ W^T + b.

    ``err(y) = ||y - ref|| / ||ref||`` with ``ref`` in float64. fp32: ``err(y) <= 1e-6``. fp16 and bf16:
    ``err(y) <= 1.5 err(base)``, where ``base`` rounds the weight to x's dtype once and multiplies with fp32
    accumulation. Three cares for few outputs, where a norm is no mean of many: if ``base`` is exact by luck, a ``ref``
    rounded once to the dtype is good enough; if the terms of the sums cancel, fp32 rounding is relative to the terms;
    and below 16 outputs the fp32 budget grows as the spread of a mean of so few does (of two outputs at K = 384, one
    call in two hundred of ``F.linear`` itself is beyond 1e-6), and the fp16 and bf16 budget is one unit of the dtype at
    least, as it is for weights of up to 3 rows, whose outputs share their errors. ``dense``: torch's own GEMM made y
    from the dequantized weight; then ``base`` may also be that GEMM, which on a GPU may round partial sums to the
    dtype.
    """
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], w_exact.shape[0])
    if y.numel() == 0:
        return
    assert bool(torch.isfinite(y).all()), "y has NaN or Inf"
    b = None if bias is None else bias.double()
    ref = F.linear(x.double(), w_exact, b)
    terms = F.linear(x.double().abs(), w_exact.abs(), None if b is None else b.abs()).norm() / x.shape[-1] ** 0.5
    fp32 = 1e-6 * max(terms.item(), ref.norm().item()) * max(1.0, (16 / y.numel()) ** 0.5)

    def error(value: torch.Tensor) -> float:
        return (value.double() - ref).norm().item()

    if x.dtype == torch.float32:
        assert error(y) <= fp32, f"error {error(y):.3g}, budget {fp32:.3g}"
        return
    rounded = w_exact.to(x.dtype).float()
    base = F.linear(x.float(), rounded, None if bias is None else bias.float()).to(x.dtype)
    budget = 1.5 * max(error(base), error(ref.to(x.dtype))) + fp32
    if y.numel() < 16 or w_exact.shape[0] < 4:
        budget = max(budget, torch.finfo(x.dtype).eps * max(terms.item(), ref.norm().item()))
    if dense:
        budget = max(budget, 1.1 * error(F.linear(x, w_exact.to(x.dtype), bias)))
    assert error(y) <= budget, f"error {error(y):.3g}, budget {budget:.3g}, base {error(base):.3g}"


# ---- calls


def scale_parts(weight: PackedWeight) -> dict[str, torch.Tensor]:
    """Views of what lies one behind the other in ``scale_data``, by the names of the canonical weight."""
    data = weight.scale_data
    if data is None:
        return {}
    if weight.scale_type is ScaleType.NESTED:
        return {"nested_offset": data[0], "nested_map": data[1:257], "nested_absmax": data[257:]}
    return {"tensor_scale": data[0]}


def gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    instance: int = -1,
    *,
    transposed: bool = False,
    pdl: bool = False,
) -> torch.Tensor:
    """The operator; with a forced kernel instance if one is given."""
    tensors, (spec, n, k) = op_arguments(weight)
    spec += (transposed << 61) + (pdl << 62)
    if instance == -1:
        return torch.ops.pyquant.gemm(x, *tensors, bias, spec, n, k)
    return torch.ops.pyquant.gemm_instance(x, *tensors, bias, spec, n, k, instance)


def gemm_instances() -> dict[int, str]:
    """Index and name of the GEMM kernels that this machine can run."""
    rows = enumerate(_library.instances())
    return {i: row["name"] for i, row in rows if row["available"] and row["is_gemm"] and row["device"] == "cpu"}


def raw(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in row-major order."""
    return t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def same_weight(a: QuantizedWeight | PackedWeight, b: QuantizedWeight | PackedWeight) -> bool:
    """Equal in every field, tensors bit for bit."""

    def key(w: QuantizedWeight | PackedWeight) -> tuple[Any, ...]:
        tensors = {name: (t.dtype, tuple(t.shape), raw(t).numpy().tobytes()) for name, t in w.tensors().items()}
        return type(w), w.format, w.n, w.k, w.group_size, w.scale_type, w.zero_type, tensors

    return key(a) == key(b)


# ---- the C API, from its header


class CxWeight(ctypes.Structure):
    """cx_weight."""

    _fields_: ClassVar = [
        ("format", ctypes.c_int32),
        ("layout", ctypes.c_int),
        ("scale_type", ctypes.c_int),
        ("zero_type", ctypes.c_int),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("codes_bytes", ctypes.c_size_t),
        ("scales_bytes", ctypes.c_size_t),
        ("zeros_bytes", ctypes.c_size_t),
        ("codebook", ctypes.c_void_p),
        ("nested_map", ctypes.c_void_p),
        ("nested_absmax", ctypes.c_void_p),
        ("nested_absmax_count", ctypes.c_int64),
        ("nested_offset", ctypes.c_void_p),
        ("tensor_scale", ctypes.c_void_p),
    ]


class CxWeightSizes(ctypes.Structure):
    """cx_weight_sizes."""

    _fields_: ClassVar = [
        ("codes_bytes", ctypes.c_size_t),
        ("scales_bytes", ctypes.c_size_t),
        ("zeros_bytes", ctypes.c_size_t),
        ("nested_absmax_count", ctypes.c_int64),
    ]


class CxGemmArgs(ctypes.Structure):
    """cx_gemm_args."""

    _fields_: ClassVar = [
        ("weight", ctypes.POINTER(CxWeight)),
        ("dtype", ctypes.c_int),
        ("m", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("ldx", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("ldy", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("instance", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
    ]


def c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library.LIBRARY))
    library.cx_last_error.restype = ctypes.c_char_p
    return library


def c_weight(weight: QuantizedWeight | PackedWeight) -> CxWeight:
    """The struct of a weight, whose tensors must outlive it."""
    packed = isinstance(weight, PackedWeight)
    tensors = {**weight.tensors(), **(scale_parts(weight) if packed else {})}
    pointers = {name: t.data_ptr() for name, t in tensors.items() if name != "scale_data"}
    return CxWeight(
        format=weight.format.id,
        layout=int(packed),
        scale_type=weight.scale_type,
        zero_type=weight.zero_type,
        n=weight.n,
        k=weight.k,
        group_size=weight.group_size,
        codes_bytes=weight.codes.nbytes,
        scales_bytes=weight.scales.nbytes,
        zeros_bytes=0 if weight.zeros is None else weight.zeros.nbytes,
        nested_absmax_count=tensors["nested_absmax"].numel() if "nested_absmax" in tensors else 0,
        **pointers,
    )
