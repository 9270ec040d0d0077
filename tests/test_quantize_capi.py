"""cx_quantize from its header: refusals on any machine, results and refusals on a GPU."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import pytest
import torch
from conftest import VARIANTS, CxWeight, c_library, c_weight, random_weight

from pyquant import _library, quantize

INVALID, NOT_SUPPORTED, TOO_SMALL = 1, 2, 3
CPU, CUDA = 0, 1
N, K = 70, 256


class CxQuantizeArgs(ctypes.Structure):
    """cx_quantize_args."""

    _fields_: ClassVar = [
        ("w", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("ldw", ctypes.c_int64),
        ("weight", ctypes.POINTER(CxWeight)),
        ("status", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("device", ctypes.c_int),
        ("stream", ctypes.c_void_p),
    ]


def quantize_error(args: Any) -> tuple[int, str]:
    library = c_library()
    return library.cx_quantize(args), library.cx_last_error().decode()


def test_the_cpu_is_refused() -> None:
    weight = random_weight(VARIANTS[0], N, K)
    struct = c_weight(weight)
    args = CxQuantizeArgs(weight=ctypes.pointer(struct), device=CPU)
    assert quantize_error(ctypes.byref(args)) == (NOT_SUPPORTED, "cx_quantize: device: expected CX_CUDA, got CX_CPU")
    assert quantize_error(None) == (INVALID, "cx_quantize: args: expected a pointer, got NULL")


def test_workspace_is_for_nested_scales() -> None:
    """An fp32 for each block, and some hundred partial sums."""
    library, bytes_ = c_library(), ctypes.c_size_t(7)
    for variant in VARIANTS:
        struct = c_weight(random_weight(variant, N, K))
        assert library.cx_quantize_workspace(ctypes.byref(struct), ctypes.byref(bytes_)) == 0
        blocks = N * K // 64 * 4 if str(variant).endswith("nested") and _library.has_cuda() else 0
        assert blocks <= bytes_.value <= blocks * 2 + 4096
        assert (bytes_.value > 0) == (blocks > 0)
        assert library.cx_quantize_workspace(ctypes.byref(struct), None) == INVALID


def test_a_canonical_weight_is_not_dequantized_on_the_cpu() -> None:
    library = c_library()
    struct = c_weight(random_weight(VARIANTS[0], N, K))
    out = torch.empty(N, K)
    status = library.cx_dequantize(
        ctypes.byref(struct), 0, ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(K), CPU, None, -1, 1
    )
    assert status == NOT_SUPPORTED
    message = "cx_dequantize: weight.layout: expected packed on the CPU, got canonical"
    assert library.cx_last_error().decode() == message


class Call:
    """A valid call, to be run or spoiled."""

    def __init__(self, name: str) -> None:
        variant = next(v for v in VARIANTS if str(v) == name)
        self.expected = quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(3)), variant.format.name)
        self.w = torch.randn(N, K, generator=torch.Generator().manual_seed(3)).cuda()
        self.weight = random_weight(variant, N, K).to("cuda")
        self.struct = c_weight(self.weight)
        self.status = torch.full((4,), 77, dtype=torch.int32, device="cuda")
        self.workspace = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        self.args = CxQuantizeArgs(
            w=self.w.data_ptr(),
            dtype=0,
            ldw=K,
            weight=ctypes.pointer(self.struct),
            status=self.status.data_ptr(),
            workspace=self.workspace.data_ptr(),
            workspace_bytes=self.workspace.nbytes,
            device=CUDA,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def run(self) -> tuple[int, str]:
        return quantize_error(ctypes.byref(self.args))


@pytest.mark.gpu
def test_codes_and_scales() -> None:
    call = Call("nf4-fp32")
    assert call.run()[0] == 0
    assert call.status[:3].tolist() == [0, 0, 0]
    assert torch.equal(call.weight.codes.cpu(), call.expected.codes)
    assert torch.equal(call.weight.scales.cpu(), call.expected.scales)


@pytest.mark.gpu
def test_status_of_bad_weights() -> None:
    call = Call("nf4-fp32")
    call.w[3, 5] = float("nan")
    assert call.run()[0] == 0
    assert call.status[0].item() != 0


@pytest.mark.gpu
def test_refusals_change_nothing() -> None:
    zeros = (ctypes.c_float * 16)()
    bad = (ctypes.c_float * 16)(*[float("inf")] * 16)

    def spoil(call: Call, **fields: Any) -> None:
        for name, value in fields.items():
            target = call.struct if name in ("layout", "codes", "codes_bytes", "k", "codebook") else call.args
            setattr(target, name, value)

    cases: list[tuple[dict[str, Any], int, str]] = [
        ({"w": None}, INVALID, "cx_quantize: w: expected a pointer, got NULL"),
        ({"status": None}, INVALID, "cx_quantize: status: expected a pointer, got NULL"),
        ({"dtype": 3}, INVALID, "cx_quantize: dtype: expected CX_FP32, CX_FP16 or CX_BF16, got 3"),
        ({"ldw": -1}, INVALID, "cx_quantize: ldw: expected >= 0, got -1"),
        ({"layout": 1}, INVALID, "cx_quantize: weight.layout: expected canonical, got packed"),
        ({"codes": None}, INVALID, "cx_quantize: weight.codes: expected a pointer, got NULL"),
        ({"codes_bytes": 5}, INVALID, "cx_quantize: weight.codes_bytes: expected 8960, got 5"),
        ({"workspace_bytes": 64}, TOO_SMALL, "cx_quantize: workspace_bytes: expected at least"),
        ({"workspace": None}, INVALID, "cx_quantize: workspace: expected a pointer aligned to 64 bytes"),
        (
            {"codebook": ctypes.addressof(zeros)},
            INVALID,
            "cx_quantize: weight.codebook: expected a value that is not 0",
        ),
        ({"codebook": ctypes.addressof(bad)}, INVALID, "cx_quantize: weight.codebook: expected finite values, got inf"),
    ]
    for fields, status, message in cases:
        call = Call("nf4-nested")
        before = call.weight.codes.clone()
        spoil(call, **fields)
        got = call.run()
        assert got[0] == status, (fields, got)
        assert got[1].startswith(message), (fields, got)
        assert torch.equal(call.weight.codes, before)
        assert call.status.tolist() == [77] * 4


@pytest.mark.gpu
def test_packed_struct_agrees_with_the_canonical_one() -> None:
    """The two layouts of a weight dequantize to the same bits through the C API."""
    weight = random_weight(VARIANTS[0], N, K).to("cuda")
    packed = weight.pack()
    library = c_library()
    outs = []
    for struct in (c_weight(weight), c_weight(packed)):
        out = torch.full((N, K), -1.0, device="cuda")
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointer = ctypes.c_void_p(out.data_ptr())
        assert library.cx_dequantize(ctypes.byref(struct), 0, pointer, ctypes.c_int64(K), CUDA, stream, -1, 1) == 0
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
