"""Files of weight shapes: ``{"m": [1, ...], "models": {"name": [[N, K], ...], ...}}``; ``m`` may be left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_shapes(path: Path) -> tuple[list[tuple[int, int]], list[int]]:
    """Shapes (N, K), each once, and the tokens, empty if the file has none.

    Raises:
        ValueError: naming the file and what was expected.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    models = content.get("models") if isinstance(content, dict) else None
    if not isinstance(models, dict) or not models:
        raise ValueError(f'{path}: expected {{"models": {{"name": [[N, K], ...]}}}}')
    shapes: dict[tuple[int, int], None] = {}
    for name, pairs in models.items():
        if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 and _positive(p) for p in pairs):
            raise ValueError(f"{path}: models: {name}: expected a list of [N, K], got {pairs!r}")
        shapes |= {(n, k): None for n, k in pairs}
    if not shapes:
        raise ValueError(f"{path}: models: expected shapes, got none")
    tokens = content.get("m", [])
    if not isinstance(tokens, list) or not _positive(tokens):
        raise ValueError(f"{path}: m: expected a list of positive integers, got {tokens!r}")
    return list(shapes), list(dict.fromkeys(tokens))


def _positive(values: list[Any]) -> bool:
    return all(type(v) is int and v > 0 for v in values)
