"""Quantized weights: canonical (what files and importers speak) and packed (what kernels read)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from .codes import row_bytes, unpack_codes
from .formats import NESTED_BLOCK, NESTED_MAP_SIZE, Encoding, Format, ScaleType, ZeroType, format_by_id
from .scales import decode_absmax_e4m4, decode_e4m3, decode_e8m0, storage_dtype, unnest_absmax

if TYPE_CHECKING:
    from typing_extensions import Self

STATE_VERSION = 1
# Elements that dequantize() decodes at a time: bounds its temporaries to some hundred MB.
_CHUNK = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class _Weight:
    """What canonical and packed weights share. ``codes``, ``scales`` and ``zeros`` lie as the subclass says."""

    TENSORS: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "codebook")

    format: Format
    n: int  # out_features
    k: int  # in_features
    group_size: int  # consecutive k that share a scale
    scale_type: ScaleType
    zero_type: ZeroType
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    codebook: torch.Tensor | None = None  # fp32 [2^bits], in place of the format's own

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return torch.Size((self.n, self.k))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def groups(self) -> int:
        """Groups of a row; the last one may be short."""
        return -(-self.k // self.group_size)

    @property
    def flat_scales(self) -> bool:
        """True when blocks cross row ends, so that scales are in flat block order."""
        return self.format.flat_blocks and self.k % self.group_size != 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors that are there, by field name."""
        return {name: t for name in self.TENSORS if (t := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over N * K."""
        return 8 * self.nbytes / (self.n * self.k)

    def map_tensors(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with ``function`` applied to every tensor."""
        tensors: dict[str, Any] = {name: function(t) for name, t in self.tensors().items()}
        return replace(self, **tensors)

    def to(self, device: torch.device | str) -> Self:
        """A copy on ``device``."""
        return self.map_tensors(lambda t: t.to(device))

    def __repr__(self) -> str:
        zero = "" if self.zero_type is ZeroType.NONE else f", zero={self.zero_type.name.lower()}"
        return (
            f"{type(self).__name__}({self.format.name}, {self.n}x{self.k}, group_size={self.group_size}, "
            f"scale={self.scale_type.name.lower()}{zero}, {self.bits_per_weight:.3f} bits per weight, "
            f"device={str(self.device)!r})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight(_Weight):
    """A canonical weight, any device.

    ``codes`` uint8 [N, ceil(K * bits / 8)], lowest k in the lowest bits; ``scales`` [N, groups] (flat
    [ceil(N * K / group_size)] where blocks cross row ends), fp32, fp16, bf16 or raw uint8; ``zeros`` [N, groups],
    uint8 or the scales' dtype.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (
        *_Weight.TENSORS,
        "nested_map",
        "nested_absmax",
        "nested_offset",
        "tensor_scale",
    )

    nested_map: torch.Tensor | None = None  # fp32 [256]
    nested_absmax: torch.Tensor | None = None  # fp32 [ceil(blocks / 256)]
    nested_offset: torch.Tensor | None = None  # fp32, 0-dim
    tensor_scale: torch.Tensor | None = None  # fp32, 0-dim

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in ``dtype``: ``decode(code) * scale`` in fp32, then one rounding."""
        from . import ops

        if ops.dequantizes_canonical(self.device, dtype):
            return ops.dequantize_canonical(self, dtype)
        values = self.values() if self.format.encoding is Encoding.CODEBOOK else None
        scales = self.decode_scales()
        out = torch.empty(self.n, self.k, dtype=dtype, device=self.device)
        rows = max(1, _CHUNK // self.k)
        for start in range(0, self.n, rows):
            stop = min(self.n, start + rows)
            codes = unpack_codes(self.codes[start:stop], self.k, self.format.bits)
            if values is not None:
                w = values[codes.int()]
            elif self.format.encoding is Encoding.SIGNED:
                sign = self.format.levels // 2
                w = ((codes ^ sign).int() - sign).float()
            else:
                w = codes.float()
            if self.zeros is not None:
                w -= self._per_weight(self.zeros.float(), start, stop)
            w *= self._per_weight(scales, start, stop)
            out[start:stop] = w
        return out

    def values(self) -> torch.Tensor:
        """The codebook in use, fp32 [2^bits]."""
        if self.codebook is not None:
            return self.codebook
        return torch.tensor(self.format.codebook, dtype=torch.float32, device=self.device)

    def nested_parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Offset, map and second-level absmax of nested scales."""
        assert self.nested_offset is not None
        assert self.nested_map is not None
        assert self.nested_absmax is not None
        return self.nested_offset, self.nested_map, self.nested_absmax

    def decode_scales(self) -> torch.Tensor:
        """The scales in fp32, in the shape of ``scales``."""
        if self.scale_type is ScaleType.NESTED:
            offset, map_, absmax = self.nested_parts()
            return unnest_absmax(self.scales, map_, absmax, offset).view(self.scales.shape)
        if self.scale_type is ScaleType.E4M4:
            return decode_absmax_e4m4(self.scales)
        if self.scale_type is ScaleType.E4M3:
            scales = decode_e4m3(self.scales)
            return scales if self.tensor_scale is None else scales * self.tensor_scale
        if self.scale_type is ScaleType.E8M0:
            return decode_e8m0(self.scales)
        return self.scales.float()

    def _per_weight(self, values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Values of groups, one for each weight of the rows ``start`` .. ``stop``: [stop - start, K]."""
        if not self.flat_scales:
            return values[start:stop].repeat_interleave(self.group_size, dim=1)[:, : self.k]
        first = torch.arange(start * self.k, stop * self.k, device=self.device)
        return values[first // self.group_size].view(stop - start, self.k)

    def pack(self, device: torch.device | str | None = None) -> PackedWeight:
        """The packed weight for this weight's device, or for ``device``."""
        from . import ops

        return ops.pack(self if device is None else self.to(device))

    def narrow(self, dim: int, start: int, length: int) -> QuantizedWeight:
        """A part as a weight of its own, as ``torch.narrow`` but copied: its values are this weight's, bit for bit.

        Where a part's edge lies inside a group, the part has smaller groups that repeat the scale. Nested scales
        become fp32 where 256 consecutive ones of the part do not share a second-level scale: always along K, along N
        where the part does not start at a multiple of 256 scales.

        Args:
            dim: 0 for rows (N), 1 for columns (K).
            start: the first row or column.
            length: how many.

        Raises:
            ValueError: on a range outside of the weight, or when the format has no group size that the part needs.
        """
        from ._narrow import narrow

        return narrow(self, dim, start, length)

    def shard(self, dim: int, rank: int, world_size: int) -> QuantizedWeight:
        """Part ``rank`` of ``world_size`` equal parts along ``dim``, for tensor parallelism; as :meth:`narrow`.

        Raises:
            ValueError: when N (``dim`` 0) or K (``dim`` 1) does not divide by ``world_size``, or as :meth:`narrow`.
        """
        from ._narrow import shard

        return shard(self, dim, rank, world_size)

    def state_dict(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All there is to store, as tensors: the fields and ``quant_spec``, int64 [7] (version, format id, scale
        type, zero type, group size, N, K). For ``load_state_dict``, safetensors and C++ readers alike."""
        spec = (STATE_VERSION, self.format.id, self.scale_type, self.zero_type, self.group_size, self.n, self.k)
        state = {prefix + name: t for name, t in self.tensors().items()}
        state[prefix + "quant_spec"] = torch.tensor([int(v) for v in spec], dtype=torch.int64)
        return state

    @staticmethod
    def from_state_dict(state: Mapping[str, torch.Tensor], prefix: str = "") -> QuantizedWeight:
        """The inverse of :meth:`state_dict`; keys that do not start with ``prefix`` are ignored.

        Raises:
            ValueError: when tensors are missing, or do not fit each other.
        """
        if prefix + "quant_spec" not in state:
            raise ValueError(f"QuantizedWeight: {prefix}quant_spec: expected a tensor, got none")
        spec = state[prefix + "quant_spec"]
        if spec.dtype != torch.int64 or spec.shape != (7,):
            raise ValueError(f"QuantizedWeight: {prefix}quant_spec: expected int64 [7], got {_describe(spec)}")
        version, format_id, scale_type, zero_type, group_size, n, k = spec.tolist()
        if version != STATE_VERSION:
            raise ValueError(f"QuantizedWeight: {prefix}quant_spec: expected version {STATE_VERSION}, got {version}")
        if scale_type not in set(ScaleType) or zero_type not in set(ZeroType):
            raise ValueError(
                f"QuantizedWeight: {prefix}quant_spec: unknown scale type {scale_type} or zero type {zero_type}"
            )
        try:
            fmt = format_by_id(format_id)
        except ValueError as error:
            raise ValueError(f"QuantizedWeight: {prefix}quant_spec: {error}") from error
        tensors = {name: state[prefix + name] for name in QuantizedWeight.TENSORS if prefix + name in state}
        for name in ("codes", "scales"):
            if name not in tensors:
                raise ValueError(f"QuantizedWeight: {prefix}{name}: expected a tensor, got none")
        weight = QuantizedWeight(fmt, n, k, group_size, ScaleType(scale_type), ZeroType(zero_type), **tensors)
        weight.check(prefix)
        return weight

    def check(self, prefix: str = "") -> None:
        """Raise ValueError, naming the tensor, unless the fields fit each other."""
        fmt = self.format
        if self.n < 1 or self.k < 1:
            raise ValueError(f"QuantizedWeight: {prefix}shape: expected N, K >= 1, got {self.n} x {self.k}")
        if not fmt.allows_group(self.group_size, self.k):
            raise ValueError(
                f"QuantizedWeight: {prefix}group_size: {fmt.name} expects {fmt.group_rule()}, got {self.group_size}"
            )
        if self.scale_type not in fmt.scale_types:
            raise ValueError(f"QuantizedWeight: {prefix}scales: {fmt.name} has no {self.scale_type.name} scales")
        if self.zero_type not in fmt.zero_types:
            raise ValueError(f"QuantizedWeight: {prefix}zeros: {fmt.name} has no {self.zero_type.name} zeros")
        blocks = -(-self.n * self.k // self.group_size) if self.flat_scales else self.n * self.groups
        scales_shape = (blocks,) if self.flat_scales else (self.n, self.groups)
        stored = storage_dtype(self.scale_type)
        nested = self.scale_type is ScaleType.NESTED
        zero_dtype = torch.uint8 if self.zero_type is ZeroType.INTEGER else stored
        has_codebook = fmt.encoding is Encoding.CODEBOOK and (fmt.needs_codebook or self.codebook is not None)
        # name: (whether it must be there, shape, dtype)
        expected: dict[str, tuple[bool, tuple[int, ...], torch.dtype]] = {
            "codes": (True, (self.n, row_bytes(self.k, fmt.bits)), torch.uint8),
            "scales": (True, scales_shape, stored),
            "zeros": (self.zero_type is not ZeroType.NONE, scales_shape, zero_dtype),
            "codebook": (has_codebook, (fmt.levels,), torch.float32),
            "nested_map": (nested, (NESTED_MAP_SIZE,), torch.float32),
            "nested_absmax": (nested, (-(-blocks // NESTED_BLOCK),), torch.float32),
            "nested_offset": (nested, (), torch.float32),
            "tensor_scale": (fmt.tensor_scale, (), torch.float32),
        }
        for name, (present, shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if (tensor is not None) != present:
                got = "none" if tensor is None else "one"
                raise ValueError(
                    f"QuantizedWeight: {prefix}{name}: expected {'a' if present else 'no'} tensor, got {got}"
                )
            if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype):
                raise ValueError(
                    f"QuantizedWeight: {prefix}{name}: expected {dtype} {list(shape)}, got {_describe(tensor)}"
                )


@dataclass(frozen=True, eq=False, repr=False)
class PackedWeight(_Weight):
    """A packed weight (``kernels/layout.hpp``), on the device whose kernels read it. All tensors are 1-D."""

    TENSORS: ClassVar[tuple[str, ...]] = (*_Weight.TENSORS, "scale_data")

    # fp32: tensor_scale [1]; or nested_offset [1], nested_map [256] and nested_absmax, one behind the other.
    scale_data: torch.Tensor | None = None

    def unpack(self) -> QuantizedWeight:
        """The canonical weight it was made from, bit for bit."""
        from . import ops

        return ops.unpack(self)

    def narrow(self, dim: int, start: int, length: int) -> PackedWeight:
        """As :meth:`QuantizedWeight.narrow`, through :meth:`unpack`: for use once, not in every call."""
        return self.unpack().narrow(dim, start, length).pack()

    def shard(self, dim: int, rank: int, world_size: int) -> PackedWeight:
        """As :meth:`QuantizedWeight.shard`, through :meth:`unpack`: for use once, not in every call."""
        return self.unpack().shard(dim, rank, world_size).pack()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [N, K] in ``dtype``, by the kernel."""
        from . import ops

        return ops.dequantize(self, dtype)


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
