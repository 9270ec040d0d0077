"""The compiled libraries: loads the torch operators, and asks libcutlass_ext what it holds."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libcutlass_ext.so"
TORCH_OPS = PACKAGE / "lib" / "_torch_ops.so"
_NOT_SUPPORTED = 2  # CX_NOT_SUPPORTED
_INT64_MAX = (1 << 63) - 1


class _FormatInfo(ctypes.Structure):
    """cx_format_info."""

    _fields_: ClassVar = [
        ("id", ctypes.c_int32),
        ("name", ctypes.c_char_p),
        ("bits", ctypes.c_int32),
        ("is_codebook", ctypes.c_int32),
        ("is_signed", ctypes.c_int32),
        ("flat_blocks", ctypes.c_int32),
        ("tensor_scale", ctypes.c_int32),
        ("scale_types", ctypes.c_uint32),
        ("zero_types", ctypes.c_uint32),
        ("codebook", ctypes.POINTER(ctypes.c_float)),
    ]


class _InstanceInfo(ctypes.Structure):
    """cx_instance_info."""

    _fields_: ClassVar = [
        ("name", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("available", ctypes.c_int32),
        ("is_gemm", ctypes.c_int32),
        ("is_transposed", ctypes.c_int32),
    ]


class _TableQuery(ctypes.Structure):
    """cx_table_query."""

    _fields_: ClassVar = [
        ("device", ctypes.c_char_p),
        ("encoding", ctypes.c_char_p),
        ("dtype", ctypes.c_int),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("processors", ctypes.c_int32),
    ]


class _TableAnswer(ctypes.Structure):
    """cx_table_answer."""

    _fields_: ClassVar = [
        ("instance", ctypes.c_char_p),
        ("gemm", ctypes.c_char_p),
        ("group_size", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("m_first", ctypes.c_int64),
        ("m_last", ctypes.c_int64),
        ("predicted", ctypes.c_int32),
    ]


class _Prediction(ctypes.Structure):
    """cx_prediction."""

    _fields_: ClassVar = [
        ("family", ctypes.c_int32),
        ("coefficients", ctypes.c_void_p),
        ("processors", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("n", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("m", ctypes.c_void_p),
    ]


def load_torch_ops() -> None:
    """Register ``torch.ops.pyquant``.

    Raises:
        ImportError: with the reason, when the library is missing or does not load under this torch.
    """
    if not TORCH_OPS.exists():
        raise ImportError(f"pyquant: {TORCH_OPS} is missing: the package was not built")
    try:
        torch.ops.load_library(str(TORCH_OPS))
    except OSError as error:
        raise ImportError(f"pyquant: torch {torch.__version__} cannot load {TORCH_OPS.name}: {error}") from error


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.cx_build_info.restype = ctypes.c_char_p
    library.cx_last_error.restype = ctypes.c_char_p
    library.cx_table_instance.restype = ctypes.c_char_p
    return library


def build_info() -> dict[str, Any]:
    """How libcutlass_ext was built: version, compiler, cuda."""
    return json.loads(_library().cx_build_info())


def formats() -> list[dict[str, Any]]:
    """The format table as compiled into libcutlass_ext; ``codebook`` is a list of floats or None."""
    rows = []
    for i in range(_library().cx_format_count()):
        info = _FormatInfo()
        _check(_library().cx_get_format(i, ctypes.byref(info)))
        row = {field[0]: getattr(info, field[0]) for field in _FormatInfo._fields_}
        row["name"] = info.name.decode()
        row["codebook"] = info.codebook[: 1 << info.bits] if info.codebook else None
        rows.append(row)
    return rows


@functools.cache
def instances() -> tuple[dict[str, Any], ...]:
    """The kernel instances in manifest order: name, device ("cpu" or "cuda"), available (on this machine), is_gemm,
    is_transposed (a GEMM, for transposed products only)."""
    rows = []
    for i in range(_library().cx_instance_count()):
        info = _InstanceInfo()
        _check(_library().cx_get_instance(i, ctypes.byref(info)))
        device = ("cpu", "cuda")[info.device]
        rows.append(
            {
                "name": info.name.decode(),
                "device": device,
                "available": bool(info.available),
                "is_gemm": bool(info.is_gemm),
                "is_transposed": bool(info.is_transposed),
            }
        )
    return tuple(rows)


@functools.cache
def has_cuda() -> bool:
    """Whether this build has kernels for GPUs."""
    return any(row["device"] == "cuda" for row in instances())


def device_name(device: str) -> str:
    """Of "cpu" (its model) or "cuda" (the current GPU), as its table carries it; "" if unknown."""
    name = ctypes.c_char_p()
    _check(_library().cx_device_name(("cpu", "cuda").index(device), ctypes.byref(name)))
    return (name.value or b"").decode()


def load_table(path: str | os.PathLike[str] | None) -> None:
    """Use the dispatch table of a file for its device, in place of the one that the library was built with.

    Args:
        path: JSON of ``pyquant table build``; None: back to the tables of the build.

    Raises:
        ValueError: naming the file and the line that is wrong; the table before stays in use.
    """
    if _library().cx_load_table(None if path is None else os.fsencode(path)) != 0:
        raise ValueError(_last_error().replace("cx_load_table: path: ", "load_table: ", 1))


def all_instance_names() -> list[str]:
    """Every instance that a table may name, also those that this build lacks."""
    names = map(_library().cx_table_instance, itertools.count())
    return [name.decode() for name in itertools.takewhile(lambda name: name is not None, names)]


def find_in_table(
    device: str, encoding: str, dtype: int, group_size: int, n: int, k: int, m: int, processors: int = 0
) -> dict[str, Any] | None:
    """What the tables in use say of a call on ``device``; None where they say nothing.

    Args:
        device: a name of :func:`device_name`.
        encoding: as in tables: int4, codebook4-nested.
        dtype: cx_dtype.
        group_size: K or more: one group per row.
        processors: SMs of ``device``, for a prediction where it has no table; 0: none is wanted.

    Returns:
        The fields of cx_table_answer; ``gemm`` and ``m_last`` may be None, ``predicted`` is a bool.
    """
    query = _TableQuery(device.encode(), encoding.encode(), dtype, group_size, n, k, m, processors)
    answer = _TableAnswer()
    status = _library().cx_find_in_table(ctypes.byref(query), ctypes.byref(answer))
    if status == _NOT_SUPPORTED:
        return None
    _check(status)
    found = {field[0]: getattr(answer, field[0]) for field in _TableAnswer._fields_}
    found["instance"] = answer.instance.decode()
    found["gemm"] = None if answer.gemm is None else answer.gemm.decode()
    found["predicted"] = bool(answer.predicted)
    found["m_last"] = None if answer.m_last == _INT64_MAX else answer.m_last
    return found


def predict(
    family: int, coefficients: NDArray[np.float64], shapes: Sequence[NDArray[np.int64]], processors: int
) -> NDArray[np.float64]:
    """ns that a cost model predicts.

    Args:
        family: 0: stream, 1: wgmma, 2: dequantize and a dense GEMM.
        coefficients: as many as cutlass_ext/cost_model.hpp says.
        shapes: N, K and M, contiguous arrays of one length.
        processors: SMs.

    Returns:
        A time for each shape; infinity where the family does not take it.
    """
    import numpy as np

    ns = np.empty(len(shapes[0]))
    arrays = (array.ctypes.data for array in shapes)
    query = _Prediction(family, coefficients.ctypes.data, processors, len(ns), *arrays)
    _check(_library().cx_predict(ctypes.byref(query), ctypes.c_void_p(ns.ctypes.data)))
    return ns


def _last_error() -> str:
    return _library().cx_last_error().decode()


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(_last_error())
