"""A model on disk: one safetensors file, or a folder with ``model.safetensors`` or shards and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import (
    CONFIG_VERSION,
    METADATA_KEY,
    QUANT_METHOD,
    CheckpointError,
    Reader,
    StoredTensor,
    replace_file,
)
from ..weight import QuantizedWeight

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"


class Model:
    """The tensors of a model on disk, read one at a time. Use it in a ``with`` statement.

    Attributes:
        path: the file or folder.
        shards: one reader for each file.
        sharded: whether an index lists the shards.

    Raises:
        FileNotFoundError: there is no such file, or a folder without a model.
        CheckpointError: a file is damaged, or the index does not fit the shards.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sharded = False
        with ExitStack() as files:
            self.shards = [files.enter_context(Reader(shard)) for shard in self._shard_paths()]
            self._reader = {name: shard for shard in self.shards for name in shard}
            if self.sharded:
                self._check_index()
            self._files = files.pop_all()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._reader))

    def __contains__(self, name: object) -> bool:
        return name in self._reader

    def __getitem__(self, name: str) -> torch.Tensor | QuantizedWeight:
        """The tensor, checked where the file has checksums."""
        return self._reader[name][name]

    def is_quantized(self, name: str) -> bool:
        return self._reader[name].is_quantized(name)

    def stored(self, name: str) -> StoredTensor:
        """The tensor (no quantized weight), not yet read."""
        return self._reader[name].stored(name)

    @property
    def files(self) -> list[str]:
        """Names of the files that a folder's weights are in, the index included."""
        return [shard.path.name for shard in self.shards] + [INDEX_FILE] * self.sharded

    def files_of(self, names: Iterable[str]) -> list[str]:
        """Names of the files that these tensors are in, sorted."""
        return sorted({self._reader[name].path.name for name in names})

    @property
    def file_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(shard.path.stat().st_size for shard in self.shards)

    def _shard_paths(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        if (self.path / SINGLE_FILE).exists():
            return [self.path / SINGLE_FILE]
        index = self.path / INDEX_FILE
        if not index.exists():
            raise FileNotFoundError(f"{self.path}: expected {SINGLE_FILE} or {INDEX_FILE} in the folder")
        self.sharded = True
        self._weight_map = _read_weight_map(index)
        shards = [self.path / name for name in sorted(set(self._weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.exists()]
        if missing:
            raise FileNotFoundError(
                f"{index}: expected {len(shards)} shards beside it, missing: {_some(missing)}; "
                "download or copy them again"
            )
        return shards

    def _check_index(self) -> None:
        stored = {name: shard.path.name for shard in self.shards for name in shard.stored_names}
        if stored != self._weight_map or len(stored) != sum(len(s.stored_names) for s in self.shards):
            differing = sorted({n for n, _ in stored.items() ^ self._weight_map.items()})
            reason = _some(differing) if differing else "a name is in two shards"
            raise CheckpointError(
                f"{self.path / INDEX_FILE}: does not fit the shards: {reason}; download or save the model again"
            )


def read_config(source: Path) -> dict[str, Any] | None:
    """config.json of the folder, or of the folder that the file is in; None if there is none."""
    path = (source if source.is_dir() else source.parent) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: no valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def write_config(folder: Path, config: Mapping[str, Any], modules: Mapping[str, dict[str, Any]], **origin: str) -> None:
    """Write config.json with the ``quantization_config`` by which transformers loads the folder.

    Args:
        folder: of a model.
        config: the other entries.
        modules: ``checkpoint.settings`` of each weight, by module name.
        origin: further entries of ``quantization_config``.
    """
    quantization = {
        "quant_method": QUANT_METHOD,
        "version": CONFIG_VERSION,
        **origin,
        "modules": dict(sorted(modules.items())),
    }
    with replace_file(folder / CONFIG_FILE) as file:
        file.write(json.dumps({**config, "quantization_config": quantization}, indent=2).encode())


def written_modules(path: Path) -> tuple[dict[str, dict[str, Any]], list[str], int]:
    """Of a written file: the settings of its layers by module, the names and the bytes of its tensors."""
    with Reader(path) as reader:
        layers = json.loads(reader.metadata[METADATA_KEY])["layers"]
        modules = {name.removesuffix(".weight"): about for name, about in layers.items()}
        return modules, list(reader.stored_names), reader.tensor_bytes


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no valid index of shards: {error}") from error
    for name in names:
        # A shard lies beside its index: a path that leads elsewhere is damage, or worse.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: expected file names, got {name!r}")
    return dict(weight_map)
