"""What a table's JSON must look like; cutlass_ext/table_reader.cpp holds the same."""

from __future__ import annotations

from typing import Any

from .encoding import PATTERN

SCHEMA_VERSION = 1

FAMILIES = {"stream": 17, "wgmma": 15, "dense": 11}  # of a cost model, and how many coefficients each has
ENCODINGS = ("int4", "codebook4")  # that a model can be about

_POSITIVE = {"type": "integer", "minimum": 1}
_NAME = {"type": "string", "minLength": 1}


def _object(optional: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


def _coefficients(family: str) -> dict[str, Any]:
    count = FAMILIES[family]
    return {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": count, "maxItems": count}


_RANGE = {
    "type": "array",
    "prefixItems": [_POSITIVE, {"type": ["integer", "null"], "minimum": 1}],
    "minItems": 2,
    "maxItems": 2,
}
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "pyquant dispatch table",
    **_object(
        ("models",),
        schema={"const": SCHEMA_VERSION},
        device=_NAME,
        processors={"type": ["integer", "null"], "minimum": 1},
        provenance={"type": "object"},
        models={
            "type": "array",
            "items": _object((), encoding={"enum": list(ENCODINGS)}, **{f: _coefficients(f) for f in FAMILIES}),
        },
        entries={
            "type": "array",
            "minItems": 1,
            "items": _object(
                encoding={"type": "string", "pattern": PATTERN},
                dtype={"enum": ["fp32", "fp16", "bf16"]},
                group_size={"type": "integer", "minimum": 0},
                n=_POSITIVE,
                k=_POSITIVE,
                buckets={
                    "type": "array",
                    "minItems": 1,
                    "items": _object(("gemm",), m=_RANGE, instance=_NAME, gemm=_NAME),
                },
            ),
        },
    ),
}


def validate(content: Any) -> None:
    """Check a table's JSON: its form, that buckets cover every M once, and that no key comes twice.

    Raises:
        ValueError: naming the field, such as ``entries[3].buckets[1].m``.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(SCHEMA).iter_errors(content))
    if error is not None:
        raise ValueError(f"{error.json_path.removeprefix('$').lstrip('.') or 'table'}: {error.message}")
    seen: dict[tuple[Any, ...], int] = {}
    about = [model["encoding"] for model in content.get("models", [])]
    if len(set(about)) != len(about):
        raise ValueError(f"models: expected one of each encoding, got {', '.join(about)}")
    for i, entry in enumerate(content["entries"]):
        key = tuple(entry[name] for name in ("encoding", "dtype", "group_size", "n", "k"))
        if key in seen:
            raise ValueError(f"entries[{i}]: the same key as entries[{seen[key]}]")
        seen[key] = i
        _check_cover(entry["buckets"], f"entries[{i}].buckets")


def _check_cover(buckets: list[dict[str, Any]], where: str) -> None:
    expected: int | None = 1
    for i, bucket in enumerate(buckets):
        first, last = bucket["m"]
        if expected is None:
            raise ValueError(f"{where}[{i}].m: the bucket before has no end")
        if first != expected:
            kind = "gap" if first > expected else "overlap"
            raise ValueError(f"{where}[{i}].m: {kind}: expected to start at {expected}, got {first}")
        if last is not None and last < first:
            raise ValueError(f"{where}[{i}].m: expected an end of at least {first}, got {last}")
        expected = None if last is None else last + 1
    if expected is not None:
        raise ValueError(f"{where}[{len(buckets) - 1}].m: gap: expected null as the last bucket's end, got {last}")
