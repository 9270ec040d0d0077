#!/usr/bin/env python3
"""Compiles every CUDA source for every architecture we ship and fails if a kernel spills registers. Needs no GPU.

    scripts/check_spills.py                 # sm_80 and sm_90a
    scripts/check_spills.py --arch 90a --rows 40

Prints the kernels that spill (bytes of stores and loads, as ptxas counts them) and those with the most registers. Each
architecture has its build folder, build/spills_<arch>, with the flags of the package's own build, so that ccache shares
what one of them compiled. Compile-time checks, such as kernels/cuda/layout_check.cu, are part of it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cuda"
TARGET = "cutlass_ext_cuda"
WARNING = re.compile(r"in function '(\w+)', (\d+) bytes spill stores, (\d+) bytes spill loads")
USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)")


@dataclass
class Kernel:
    arch: str
    source: str
    symbol: str
    registers: int
    stack: int
    stores: int = 0
    loads: int = 0

    @property
    def spills(self) -> bool:
        return self.stores + self.loads > 0


def run(*command: str | Path) -> str:
    """The command's output; ends the script where it fails."""
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\ncheck_spills: {' '.join(map(str, command))}: exit status {done.returncode}")
    return done.stdout


def kernels_of(arch: str, jobs: int) -> list[Kernel]:
    build = ROOT / "build" / f"spills_{arch}"
    options = ("-DPYQUANT_CUDA=on", f"-DPYQUANT_ARCHS={arch}", "-DCX_TORCH=OFF")
    run(
        "cmake",
        "-S",
        ROOT / "cutlass_ext",
        "-B",
        build,
        "-G",
        "Ninja",
        f"-DPython_EXECUTABLE={sys.executable}",
        *options,
    )
    # Compiled objects warn no more: all anew, as far as there is no ccache, which repeats the warnings.
    run("cmake", "--build", build, "--target", "clean")
    log = run("cmake", "--build", build, "--target", TARGET, "-j", str(jobs))

    objects = build / "kernels_cuda" / "CMakeFiles" / f"{TARGET}.dir"
    kernels: dict[str, Kernel] = {}
    for source in sorted(SOURCES.rglob("*.cu")):
        name = source.relative_to(SOURCES)
        compiled = objects / f"{name}.o"
        if not compiled.exists():
            sys.exit(f"check_spills: expected {name} in kernels/cuda/CMakeLists.txt, {TARGET} does not compile it")
        for symbol, registers, stack in USAGE.findall(run("cuobjdump", "--dump-resource-usage", compiled)):
            kernels[symbol] = Kernel(arch, str(name), symbol, int(registers), int(stack))
    for symbol, stores, loads in WARNING.findall(log):
        kernels[symbol].stores, kernels[symbol].loads = int(stores), int(loads)
    if not kernels:
        sys.exit(f"check_spills: expected kernels for sm_{arch}, cuobjdump shows none")
    # Should ptxas word its warning differently one day.
    if "spilled to local memory" in log and not any(k.spills for k in kernels.values()):
        sys.exit(f"{log}\ncheck_spills: ptxas warns of spills, in words that this script does not know")
    return list(kernels.values())


def print_table(title: str, kernels: list[Kernel]) -> None:
    names = run("c++filt", "-p", *(k.symbol for k in kernels)).splitlines()
    print(f"\n{title}\n{'arch':>7} {'registers':>9} {'stack':>6} {'stores':>6} {'loads':>6}  kernel")
    for k, name in zip(kernels, names, strict=True):
        name = re.sub(r"cutlass_ext::(cuda::)?|\(anonymous namespace\)::", "", name)
        name = re.sub(r"\((?:[\w:]+::)?\w+\)(?=\d)", "", name)  # enumerators: the number says it
        print(f"{'sm_' + k.arch:>7} {k.registers:>9} {k.stack:>6} {k.stores:>6} {k.loads:>6}  {k.source}: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", help="an architecture, such as 90a; may be repeated (80 and 90a)")
    parser.add_argument("--rows", type=int, default=12, help="kernels to show of those with the most registers")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parallel compilations")
    options = parser.parse_args()
    # Paths inside the clone do not count for ccache's keys.
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")

    archs = options.arch or ["80", "90a"]
    kernels = [kernel for arch in archs for kernel in kernels_of(arch, options.jobs)]
    spilling = sorted((k for k in kernels if k.spills), key=lambda k: -(k.stores + k.loads))
    most = sorted(kernels, key=lambda k: (-k.registers, -k.stack))[: options.rows]
    print_table(f"{len(kernels)} kernels; the most registers:", most)
    if spilling:
        print_table(f"{len(spilling)} kernels spill (bytes):", spilling)
        sys.exit(1)
    print(f"\nno kernel spills: sm_{', sm_'.join(archs)}")


if __name__ == "__main__":
    main()
