"""Checkpoint files: safetensors that hold quantized weights beside ordinary tensors.

A quantized weight called ``<p>.weight`` is stored as the tensors ``<p>.weight.codes``,
``<p>.weight.scales``, .. of :meth:`QuantizedWeight.state_dict`, so any safetensors reader can open the
file. The header's metadata entry ``pyquant`` is a JSON object:

* ``version``: 1.
* ``layers``: settings of each quantized weight, for people and tools; :func:`load` reads ``quant_spec``.
* ``crc32``: zlib's CRC-32 of every tensor's bytes.
* ``header_crc32``: CRC-32 of names, dtypes, shapes and all metadata, so that a changed header is seen too.

Files of equal content are equal byte for byte. Files without the entry (a ``state_dict`` saved by other
means) are read too, unchecked.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from .weight import PackedWeight, QuantizedWeight

FILE_VERSION = 1
# Of quantization_config in a model's config.json.
QUANT_METHOD = "pyquant"
CONFIG_VERSION = 1
METADATA_KEY = "pyquant"
_SPEC = ".quant_spec"
_PARTS = (*QuantizedWeight.TENSORS, "quant_spec")
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
# Bytes of a StoredTensor that are in memory while it is copied.
_PIECE = 1 << 22
# Tensors of so many bytes are read into a mapping of their own.
_MAPPED = 1 << 20


class CheckpointError(ValueError):
    """A file that is no checkpoint, or is damaged. The message names the file and what is wrong."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file: what is to be copied, or read once, without a mapping that stays in memory.

    Attributes:
        path: the safetensors file.
        name: the tensor's.
        dtype: the tensor's.
        shape: the tensor's.
        offset: of its first byte in the file.
        nbytes: how many there are.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            CheckpointError: the file has become shorter.
        """
        data = _memory(self.nbytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            self._fill(file, _buffer(data))
        return data.view(self.dtype).view(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, one behind the other; a piece is valid until the next one.

        Raises:
            CheckpointError: the file has become shorter.
        """
        buffer = memoryview(bytearray(min(_PIECE, self.nbytes)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, self.nbytes, _PIECE):
                piece = buffer[: min(_PIECE, self.nbytes - start)]
                self._fill(file, piece)
                yield piece

    def _fill(self, file: FileIO, buffer: memoryview) -> None:
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise CheckpointError(f"{self.path}: {self.name}: the file has become shorter while it was read")
            buffer = buffer[count:]


class Reader:
    """A checkpoint opened for reading one tensor at a time: names to tensors and quantized weights.

    Tensors are mapped from the file, not copied: only what is used is read. Every tensor is checked against
    its CRC-32 when it is asked for.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged or no safetensors file; damaged data of a tensor is found by
            ``reader[name]``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise CheckpointError(f"{self.path}: expected a file, got a directory")
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: no such file")
        try:
            self._file = safe_open(self.path, framework="pt")
            self.stored_names: tuple[str, ...] = tuple(self._file.keys())
            self.metadata: dict[str, str] = dict(self._file.metadata() or {})
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: no safetensors file, or a truncated one: {error}") from error
        self._crc32 = self._check_header()
        self._quantized = {name.removesuffix(_SPEC) for name in self.stored_names if name.endswith(_SPEC)}
        stored = set(self.stored_names)
        self._parts = {
            name: [part for part in (f"{name}.{p}" for p in _PARTS) if part in stored] for name in self._quantized
        }
        for name in self._quantized & stored:
            raise CheckpointError(f"{self.path}: {name} is both a tensor and a quantized weight")
        inner = {part for parts in self._parts.values() for part in parts}
        self._names = sorted((stored - inner) | self._quantized)

    @property
    def checked(self) -> bool:
        """Whether the file carries checksums."""
        return self._crc32 is not None

    def keys(self) -> list[str]:
        """Names, sorted; a quantized weight counts once, as ``<p>.weight``."""
        return list(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._quantized or name in self._names

    def is_quantized(self, name: str) -> bool:
        """Whether ``name`` is a quantized weight."""
        return name in self._quantized

    def __getitem__(self, name: str) -> torch.Tensor | QuantizedWeight:
        """The tensor or quantized weight, checked.

        Raises:
            KeyError: there is no such name.
            CheckpointError: the data does not match its checksum, or is no valid weight.
        """
        if name not in self:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        if name not in self._quantized:
            return self._checked(name)
        parts = {part: self._checked(part) for part in self._parts[name]}
        try:
            return QuantizedWeight.from_state_dict(parts, f"{name}.")
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, without the header."""
        return self.path.stat().st_size - self._header[0]

    def stored(self, name: str) -> StoredTensor:
        """The tensor (not a quantized weight), unchecked and not yet read.

        Raises:
            KeyError: there is no such tensor.
            CheckpointError: torch has no such dtype.
        """
        if name not in self or name in self._quantized:
            raise KeyError(f"{self.path}: no tensor {name!r}")
        data, entries = self._header
        entry = entries[name]
        dtype, (start, stop) = _DTYPES.get(entry["dtype"]), entry["data_offsets"]
        if dtype is None:
            raise CheckpointError(
                f"{self.path}: {name}: cannot be read: expected one of {', '.join(_DTYPES)}, got {entry['dtype']}"
            )
        return StoredTensor(self.path, name, dtype, tuple(entry["shape"]), data + start, stop - start)

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the entries of the tensors; safetensors has checked them."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return 8 + length, json.loads(file.read(length))

    def _map(self, name: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            # What safetensors and torch raise for a dtype that this torch does not have.
            raise CheckpointError(f"{self.path}: {name}: cannot be read: {error}") from error
        return tensor

    def _checked(self, name: str) -> torch.Tensor:
        tensor = self._map(name)
        if self._crc32 is not None and _crc32(tensor) != self._crc32[name]:
            raise CheckpointError(f"{self.path}: {name}: the data is damaged (CRC-32 does not match)")
        return tensor

    def _check_header(self) -> dict[str, int] | None:
        """The checksums of the tensors, None if the file has none."""
        text = self.metadata.get(METADATA_KEY)
        if text is None:
            return None
        damaged = CheckpointError(f"{self.path}: the header is damaged (CRC-32 does not match)")
        try:
            info = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: the header is damaged: metadata {METADATA_KEY!r}: {error}") from error
        if not isinstance(info, dict) or not isinstance(info.get("crc32"), dict):
            raise damaged
        if info.get("version") != FILE_VERSION:
            version = info.get("version")
            raise CheckpointError(f"{self.path}: expected file version {FILE_VERSION}, got {version!r}")
        slices = {name: self._file.get_slice(name) for name in self.stored_names}
        layout = {name: (s.get_dtype(), list(s.get_shape())) for name, s in slices.items()}
        metadata = {key: value for key, value in self.metadata.items() if key != METADATA_KEY}
        if info.pop("header_crc32", None) != _header_crc32(layout, metadata, info):
            raise damaged
        if info["crc32"].keys() != set(self.stored_names):
            raise damaged
        crc32: dict[str, int] = info["crc32"]
        return crc32


def load(path: str | os.PathLike[str]) -> dict[str, torch.Tensor | QuantizedWeight]:
    """All tensors and quantized weights of a file, checked, on the CPU.

    Tensors are mapped from the file: do not change the file in place while they are in use (:func:`save`
    replaces it, which is safe).

    Returns:
        By name; a quantized weight stands under ``<p>.weight``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged or no safetensors file.
    """
    with Reader(path) as reader:
        return {name: reader[name] for name in reader}


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor | StoredTensor | QuantizedWeight],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and quantized weights to a safetensors file.

    The file is complete or not there: it is written under a temporary name in the same folder, flushed to the
    disk, and renamed. An older file stays as it is until then.

    Args:
        path: the file; an existing one is replaced.
        tensors: by name; dense, any device; or of another file, and then copied in pieces.
        metadata: strings to keep in the header; the key ``pyquant`` is taken.

    Raises:
        TypeError: a value is no dense tensor, or metadata is not text.
        ValueError: two entries would have the same name, or a dtype cannot be stored.
        OSError: the file cannot be written.
    """
    metadata = dict(metadata or {})
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"save: metadata: expected strings, got {key!r}: {value!r}")
    if METADATA_KEY in metadata:
        raise ValueError(f"save: metadata: the key {METADATA_KEY!r} is taken")
    stored = _stored_tensors(tensors)
    layout = {name: (_DTYPE_NAMES[t.dtype], list(t.shape)) for name, t in stored.items()}
    info: dict[str, Any] = {
        "version": FILE_VERSION,
        "layers": {name: settings(w) for name, w in tensors.items() if isinstance(w, QuantizedWeight)},
        "crc32": _checksums(stored),
    }
    info["header_crc32"] = _header_crc32(layout, metadata, info)
    metadata[METADATA_KEY] = _canonical_json(info)
    header = _header(stored, metadata)
    with replace_file(path) as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for tensor in stored.values():
            file.writelines(_pieces(tensor))


@contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends, and vanishes if it raises."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Bring renames in a folder to the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _stored_tensors(
    tensors: Mapping[str, torch.Tensor | StoredTensor | QuantizedWeight],
) -> dict[str, torch.Tensor | StoredTensor]:
    """Contiguous CPU tensors in file order: wide dtypes first, which keeps tensors aligned, then names."""
    stored: dict[str, torch.Tensor | StoredTensor] = {}
    for name, value in tensors.items():
        parts: Mapping[str, torch.Tensor | StoredTensor]
        if isinstance(value, QuantizedWeight):
            parts = value.state_dict(f"{name}.")
        elif isinstance(value, StoredTensor) or (
            isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
        ):
            parts = {name: value}
        else:
            raise TypeError(f"save: {name}: expected a dense tensor or a QuantizedWeight, got {type(value).__name__}")
        for key, tensor in parts.items():
            if key in stored or (key != name and key in tensors) or key == "__metadata__":
                raise ValueError(f"save: {name}: the name {key!r} is taken")
            if tensor.dtype not in _DTYPE_NAMES:
                raise ValueError(f"save: {key}: safetensors cannot hold {tensor.dtype}")
            stored[key] = tensor if isinstance(tensor, StoredTensor) else tensor.detach().cpu().contiguous()
    return dict(sorted(stored.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))


def _header(stored: Mapping[str, torch.Tensor | StoredTensor], metadata: Mapping[str, str]) -> bytes:
    # Not safetensors.serialize_file: it orders metadata by a random hash, so files of equal content differ.
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, tensor in stored.items():
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _memory(nbytes: int) -> torch.Tensor:
    """uint8 [nbytes], not initialized.

    Large ones go back to the system when they are freed. malloc would keep them as holes between the longer-lived
    weights that are made from them, one after the other: twice the memory.
    """
    if nbytes < _MAPPED:
        return torch.empty(nbytes, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)


def _buffer(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _pieces(tensor: torch.Tensor | StoredTensor) -> Iterator[memoryview]:
    return tensor.pieces() if isinstance(tensor, StoredTensor) else iter([_buffer(tensor)])


def _checksums(stored: Mapping[str, torch.Tensor | StoredTensor]) -> dict[str, int]:
    with ThreadPoolExecutor(2) as pool:  # zlib lets other threads run
        return dict(zip(stored, pool.map(_crc32, stored.values()), strict=True))


def _crc32(tensor: torch.Tensor | StoredTensor) -> int:
    crc = 0
    for piece in _pieces(tensor):
        crc = zlib.crc32(piece, crc)
    return crc


def _header_crc32(layout: Mapping[str, Any], metadata: Mapping[str, str], info: Mapping[str, Any]) -> int:
    return zlib.crc32(_canonical_json([layout, metadata, info]).encode())


def _canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def settings(weight: QuantizedWeight | PackedWeight) -> dict[str, Any]:
    """A weight's format and shape as JSON: in the header of files, and in ``modules`` of a model's config.json."""
    return {
        "format": weight.format.name,
        "bits": weight.format.bits,
        "group_size": weight.group_size,
        "scale_type": weight.scale_type.name.lower(),
        "zero_type": weight.zero_type.name.lower(),
        "shape": [weight.n, weight.k],
    }
