"""Runs CMake for the C++ libraries and tags the wheel for any Python: the binaries contain no CPython API."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs cutlass_ext/ into the package: lib/ and include/."""

    def run(self) -> None:
        development = self.inplace or self.editable_mode
        package = ROOT / "pyquant" if development else Path(self.build_lib) / "pyquant"
        # A fixed folder, so that a rebuild is incremental and ccache sees equal paths.
        build = ROOT / "build" / "cmake"
        configure = [
            "cmake",
            *("-S", str(ROOT / "cutlass_ext")),
            *("-B", str(build)),
            *("-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={package.resolve()}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True, stdout=subprocess.DEVNULL)

    def get_outputs(self) -> list[str]:
        return []


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: one wheel for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    """Makes setuptools build an extension and a platform wheel without declaring a Python module."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=BinaryDistribution,
    ext_modules=[Extension("pyquant._cmake", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
