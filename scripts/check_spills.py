#!/usr/bin/env python3
"""Compiles every CUDA source for every architecture we ship and fails if a kernel spills registers or its wgmma are
serialised. Needs no GPU.

    scripts/check_spills.py                 # sm_80 and sm_90a
    scripts/check_spills.py --arch 90a --rows 40

Prints the kernels that spill (bytes of stores and loads) and those with the most registers, as ptxas reports them. Each
architecture has its build folder, build/spills_<arch>. Compile-time checks, such as kernels/cuda/layout_check.cu, are
part of it.
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
USAGE = re.compile(
    r"Compiling entry function '(\w+)' for '\w+'\n.*Function properties for \w+\n"
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers"
)
# A kernel whose wgmma are serialised runs at a fraction of its speed; ptxas only remarks it.
SERIALISED = re.compile(r"^.*wgmma\.mma_async instructions are serialized.*$", re.MULTILINE)


@dataclass
class Kernel:
    arch: str
    name: str
    registers: int
    stack: int
    stores: int
    loads: int

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
    options = ("-DPYQUANT_CUDA=on", f"-DPYQUANT_ARCHS={arch}", "-DCX_TORCH=OFF", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v")
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
    # Objects that exist report nothing: all anew, as far as there is no ccache, which repeats the reports.
    run("cmake", "--build", build, "--target", "clean")
    log = run("cmake", "--build", build, "--target", TARGET, "-j", str(jobs))

    compiled = set(re.findall(rf"{TARGET}\.dir/(\S+\.cu)\.o", log))
    missing = {str(source.relative_to(SOURCES)) for source in SOURCES.rglob("*.cu")} - compiled
    if missing:
        sys.exit(f"check_spills: expected {', '.join(sorted(missing))} in kernels/cuda/CMakeLists.txt")
    serialised = sorted(set(SERIALISED.findall(log)))
    if serialised:
        sys.exit("\n".join(["check_spills: ptxas serialises wgmma:", *serialised]))
    found = USAGE.findall(log)
    if len(found) != log.count("Compiling entry function") or not found:
        sys.exit(f"{log}\ncheck_spills: ptxas reports in words that this script does not know")
    names = run("c++filt", "-p", *(symbol for symbol, *_ in found)).splitlines()
    return [
        Kernel(arch, _short(name), int(registers), int(stack), int(stores), int(loads))
        for name, (_, stack, stores, loads, registers) in zip(names, found, strict=True)
    ]


def _short(name: str) -> str:
    name = re.sub(r"cutlass_ext::(cuda::)?|\(anonymous namespace\)::", "", name)
    return re.sub(r"\((?:[\w:]+::)?\w+\)(?=\d)", "", name)  # enumerators: the number says it


def print_table(title: str, kernels: list[Kernel]) -> None:
    print(f"\n{title}\n{'arch':>7} {'registers':>9} {'stack':>6} {'stores':>6} {'loads':>6}  kernel")
    for k in kernels:
        print(f"{'sm_' + k.arch:>7} {k.registers:>9} {k.stack:>6} {k.stores:>6} {k.loads:>6}  {k.name}")


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
        sys.exit("check_spills: kernels spill registers")
    print(f"\nno kernel spills: sm_{', sm_'.join(archs)}")


if __name__ == "__main__":
    main()
