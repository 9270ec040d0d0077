"""The compiled libraries: loads the torch operators, and asks libcutlass_ext what it holds."""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any, ClassVar

import torch

PACKAGE = Path(__file__).resolve().parent
LIBRARY = PACKAGE / "lib" / "libcutlass_ext.so"
TORCH_OPS = PACKAGE / "lib" / "_torch_ops.so"


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
    """The kernel instances: name, device ("cpu" or "cuda"), available (on this machine), is_gemm; in manifest order."""
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
            }
        )
    return tuple(rows)


@functools.cache
def has_cuda() -> bool:
    """Whether this build has kernels for GPUs."""
    return any(row["device"] == "cuda" for row in instances())


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(_library().cx_last_error().decode())
