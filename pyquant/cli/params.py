"""Types of command line values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class CommaList(click.ParamType):
    """``a,b,c``: a tuple of values of another type. Options of it are repeatable; see :func:`flatten`."""

    def __init__(self, item: click.ParamType) -> None:
        self.item = item
        self.name = f"{item.name}[,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in str(value).split(","))


def flatten(lists: Sequence[tuple[Any, ...]]) -> list[Any]:
    """The values of a repeated option, each once, in the order they were given."""
    return list(dict.fromkeys(item for values in lists for item in values))


class Shape(click.ParamType):
    """``NxK``."""

    name = "NxK"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        n, _, k = str(value).partition("x")
        if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0):
            self.fail(f"expected NxK such as 4096x4096, got {value!r}", param, ctx)
        return int(n), int(k)


class Format(click.ParamType):
    """``name[-gN][-nested]``."""

    name = "format"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..bench.format_spec import parse_format_spec

        try:
            return parse_format_spec(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class IntRanges(click.ParamType):
    """``1,16:128:16``: positive integers, each once, sorted; ``start:end[:step]`` includes the end."""

    name = "INT|START:END[:STEP][,...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        values: set[int] = set()
        for part in str(value).split(","):
            numbers = [int(word) if word.isdigit() else 0 for word in part.strip().split(":")]
            if len(numbers) > 3 or 0 in numbers or numbers[0] > numbers[min(1, len(numbers) - 1)]:
                self.fail(f"expected positive integers or start:end:step such as 1,16:128:16, got {part!r}", param, ctx)
            first, last, step = (*numbers, *(numbers[0], 1)[len(numbers) - 1 :])[:3]
            values.update(range(first, last + 1, step))
        return tuple(sorted(values))


class ModelVariant(click.ParamType):
    """Whose linear layers a model has: a name, or a format of pyquant's."""

    name = "variant"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from ..bench.model.variants import parse_variant

        try:
            return parse_variant(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
