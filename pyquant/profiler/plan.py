"""What to measure: the cases of a run, in an order in which instances that compete come one after the other."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .. import _library
from ..bench.format_spec import FormatSpec
from ..formats import FORMATS, Encoding


@dataclass(frozen=True)
class Setting:
    """What all cases of a run share.

    Attributes:
        device: "cpu" or "cuda".
        dtype: of x and y: fp32, fp16, bf16.
        cache: "cold", every call on another copy of the weight, or "hot", all on one.
        launch: "graph" (a CUDA graph of many calls), "stream" (launched one by one), "host" (on the CPU).
    """

    device: str
    dtype: str
    bias: bool = False
    cache: str = "cold"
    launch: str = "graph"
    verify: bool = True


@dataclass(frozen=True)
class Case:
    """One instance on one problem."""

    n: int
    k: int
    spec: FormatSpec
    m: int
    index: int  # of the instance, in the manifest
    instance: str
    is_gemm: bool  # else it dequantizes, and a dense GEMM follows

    def key(self, setting: Setting) -> tuple[str, ...]:
        """Tells the rows of a CSV apart: the columns of :data:`~pyquant.profiler.rows.KEY`."""
        s = setting
        problem = map(str, (self.m, self.n, self.k, self.spec))
        return (*problem, s.dtype, str(s.bias), s.cache, s.launch, self.instance)

    def command(self, setting: Setting) -> str:
        """A command line that measures this case again."""
        words = ["pyquant", "profile", "--device", setting.device, "--kernels", self.instance]
        words += [f"--m={self.m}", f"--n={self.n}", f"--k={self.k}", f"--formats={self.spec}"]
        words += [f"--dtype={setting.dtype}", f"--{setting.cache}"]
        words += [f"--{setting.launch}"] if setting.device == "cuda" else []
        return shlex.join(words + ["--bias"] * setting.bias + ["--no-verify"] * (not setting.verify))


def instances_of(device: str, globs: Sequence[str]) -> list[tuple[int, str, bool]]:
    """Index, name and is_gemm of the instances that ``device`` can run and one of ``globs`` matches; no globs: all.

    A glob may leave out the device in front of a name, and may name a format (``wgmma_nf4_*``) in place of its
    encoding (``wgmma_codebook4_*``). Of instances that dequantize there is the first only: a call takes no other. None
    of those for transposed products, which tables say nothing about.
    """
    rows = [(i, r) for i, r in enumerate(_library.instances()) if not r["is_transposed"]]
    usable = [(i, str(r["name"]), bool(r["is_gemm"])) for i, r in rows if r["device"] == device and r["available"]]
    dense = next((row for row in usable if not row[2]), None)
    usable = [row for row in usable if row[2] or row == dense]
    return [row for row in usable if not globs or any(_matches(row[1], device, glob) for glob in globs)]


def _matches(name: str, device: str, glob: str) -> bool:
    words = name.split("_")
    names = {name}
    for fmt in FORMATS.values():
        kind = "codebook" if fmt.encoding is Encoding.CODEBOOK else "int"  # kernels of int4 take uint4 as well
        names.add("_".join(fmt.name if word == f"{kind}{fmt.bits}" else word for word in words))
    return any(fnmatchcase(n, glob) or fnmatchcase(n.removeprefix(f"{device}_"), glob) for n in names)


def cases(
    shapes: Sequence[tuple[int, int]],
    specs: Sequence[FormatSpec],
    tokens: Sequence[int],
    instances: Sequence[tuple[int, str, bool]],
) -> Iterator[Case]:
    """Every instance on every problem."""
    for n, k in shapes:
        for spec in specs:
            for m in tokens:
                for index, name, is_gemm in instances:
                    yield Case(n, k, spec, m, index, name, is_gemm)
