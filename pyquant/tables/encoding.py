"""How a table names what kernels know of a weight format: its encoding, not its name."""

from __future__ import annotations

from ..bench.format_spec import FormatSpec, parse_format_spec
from ..formats import FORMATS, Encoding, Format, ScaleType
from ..weight import PackedWeight

_KINDS = {Encoding.SIGNED: "int", Encoding.UNSIGNED: "uint", Encoding.CODEBOOK: "codebook"}
# cutlass_ext/table_reader.cpp accepts the same names.
PATTERN = r"^(int|uint|codebook)[2-8](-nested)?(-flat)?$"


def encoding_name(spec: FormatSpec, group_size: int, k: int) -> str:
    """``int4``, ``uint4``, ``codebook4-nested-flat``: kind and bits of the codes; whether absmax is nested; whether
    groups cross the ends of rows, which few kernels take."""
    fmt = FORMATS[spec.name]
    return _name(fmt, spec.nested, fmt.flat_blocks and k % group_size != 0)


def packed_encoding(weight: PackedWeight) -> str:
    """The same for a packed weight."""
    return _name(weight.format, weight.scale_type is ScaleType.NESTED, weight.flat_scales)


def _name(fmt: Format, nested: bool, flat: bool) -> str:
    return f"{_KINDS[fmt.encoding]}{fmt.bits}{'-nested' if nested else ''}{'-flat' if flat else ''}"


def encoding_of_format(text: str, group_size: int, k: int) -> str:
    """The same for the ``format`` cell of a CSV, such as ``nf4-g128-nested``.

    Raises:
        ValueError: naming what was expected.
    """
    return encoding_name(parse_format_spec(text), group_size, k)
