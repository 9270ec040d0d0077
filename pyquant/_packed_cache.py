"""Packed weights of bitsandbytes tensors, made once for each pair of tensor and ``QuantState``.

The key is the memory that the tensor views, so that ``B``, ``B.t()`` and ``B.data`` share one packed weight. Memory is
known by its storage object, held weakly: the packed weight goes when the storage does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ._quant_state import weight_of_quant_state
from .ops import op_arguments
from .weight import PackedWeight

_Key = tuple[int, int, int, torch.dtype]


@dataclass(frozen=True)
class _View:
    """A tensor's memory at one version."""

    storage: weakref.ref
    offset: int
    numel: int
    version: int | None

    def shows(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is the same memory, unchanged."""
        return (
            self.storage() is tensor.untyped_storage()
            and self.offset == tensor.storage_offset()
            and self.numel == tensor.numel()
            and self.version == version_of(tensor)
        )


@dataclass(frozen=True)
class CacheEntry:
    """A packed weight, the arguments of the operator, and what they were made from."""

    weight: PackedWeight
    tensors: tuple[torch.Tensor | None, ...]
    integers: tuple[int, int, int]
    views: tuple[_View, ...]
    settings: tuple[Any, ...]


_entries: dict[_Key, CacheEntry] = {}


def version_of(tensor: torch.Tensor) -> int | None:
    """A number that in-place changes count up; None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


def packed(stored: torch.Tensor, quant_state: Any, prefix: str = "") -> CacheEntry:
    """The packed weight of ``stored``; made again when it or the quant state was changed in place.

    Raises:
        LoadError: when the two are no weight.
    """
    key = (id(stored.untyped_storage()), int(stored.storage_offset()), stored.numel(), stored.dtype)
    sources = _sources(stored, quant_state)
    settings = (tuple(quant_state.shape), quant_state.blocksize, quant_state.quant_type)
    entry = _entries.get(key)
    if entry is not None and entry.settings == settings and len(entry.views) == len(sources):
        for view, tensor in zip(entry.views, sources, strict=True):
            if not view.shows(tensor):
                break
        else:
            return entry
    with torch.no_grad():
        weight = weight_of_quant_state(stored, quant_state, prefix).pack()
    forget = _forget(key)
    views = tuple(_view(t, forget if t is stored else None) for t in sources)
    entry = CacheEntry(weight, *op_arguments(weight), views, settings)
    _entries[key] = entry
    return entry


def _sources(stored: torch.Tensor, quant_state: Any) -> list[torch.Tensor]:
    sources = [stored, quant_state.absmax, quant_state.code]
    if quant_state.state2 is not None:
        sources += [quant_state.offset, quant_state.state2.absmax, quant_state.state2.code]
    return [t for t in sources if isinstance(t, torch.Tensor)]


def _view(tensor: torch.Tensor, forget: Callable[[Any], None] | None) -> _View:
    storage = weakref.ref(tensor.untyped_storage(), forget)
    return _View(storage, int(tensor.storage_offset()), tensor.numel(), version_of(tensor))


def _forget(key: _Key) -> Callable[[Any], None]:
    def forget(storage: Any) -> None:
        entry = _entries.get(key)
        # The id may have passed to another storage, whose entry stays.
        if entry is not None and entry.views[0].storage is storage:
            del _entries[key]

    return forget
