"""A quantized weight as users write it on the command line: ``name[-gN][-nested]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..formats import FORMATS, ScaleType, get_format
from ..quantize import quantize
from ..weight import QuantizedWeight

_GRAMMAR = re.compile(r"(?P<name>[a-z0-9]+)(?:-g(?P<group>[0-9]+|K))?(?P<nested>-nested)?")
_WHOLE_ROW = -1  # what pyquant.quantize takes for a group of K


@dataclass(frozen=True)
class FormatSpec:
    """A format, a group size (None: the format's default; -1: K), and whether absmax is nested."""

    name: str
    group_size: int | None = None
    nested: bool = False

    def __str__(self) -> str:
        group = "" if self.group_size is None else f"-g{'K' if self.group_size == _WHOLE_ROW else self.group_size}"
        return self.name + group + ("-nested" if self.nested else "")

    def quantize(self, w: torch.Tensor) -> QuantizedWeight:
        """``w`` in this format. A format whose weights bring a codebook gets evenly spaced values."""
        fmt = FORMATS[self.name]
        codebook = torch.linspace(-1, 1, fmt.levels) if fmt.needs_codebook else None
        return quantize(w, self.name, self.group_size, self.nested, codebook=codebook)


def parse_format_spec(text: str) -> FormatSpec:
    """``nf4``, ``int4-g128``, ``int4-gK``, ``nf4-nested``, ``nf4-g128-nested``.

    Raises:
        ValueError: naming what was expected.
    """
    match = _GRAMMAR.fullmatch(text)
    if match is None:
        raise ValueError(f"format: expected name[-gN][-nested] such as nf4, int4-g128 or nf4-nested, got {text!r}")
    fmt = get_format(match["name"], "bench")
    group = None if match["group"] is None else _WHOLE_ROW if match["group"] == "K" else int(match["group"])
    if group is not None and (group == 0 or (fmt.group_sizes and group not in fmt.group_sizes)):
        raise ValueError(f"format: group size: {fmt.name} expects {fmt.group_rule()}, got {text!r}")
    nested = match["nested"] is not None
    if nested and ScaleType.NESTED not in fmt.scale_types:
        names = ", ".join(f.name for f in FORMATS.values() if ScaleType.NESTED in f.scale_types)
        raise ValueError(f"format: expected one of {names} for nested scales, got {text!r}")
    return FormatSpec(fmt.name, group, nested)
