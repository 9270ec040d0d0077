"""A package of AOTInductor, run by a C++ program that loads the operators: examples/cpp_aoti as its README says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cpp import run

import pyquant
from pyquant import _library

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "cpp_aoti"

pytestmark = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a C++ compiler"
)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    done = run(sys.executable, FOLDER / "export.py", path, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    return path


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    done = run("cmake", "-S", FOLDER, "-B", build, prefix)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("cmake", "--build", build)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "aoti_runner"


def example_model() -> torch.nn.Module:
    names: dict[str, object] = {"__name__": "export"}
    exec((FOLDER / "export.py").read_text(), names)
    model = names["make_model"]()  # type: ignore[operator]
    assert isinstance(model[0], pyquant.nn.QuantLinear)
    return model


def test_cpp_program_gives_the_models_results(package: Path, runner: Path, tmp_path: Path) -> None:
    model = example_model()
    for rows in (1, 5, 70):
        x = torch.randn(rows, 256)
        x.numpy().tofile(tmp_path / "x.bin")
        done = run(runner, package, _library.TORCH_OPS, tmp_path / "x.bin", tmp_path / "y.bin")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"y: [{rows}, 256]\n"
        y = torch.from_numpy(np.fromfile(tmp_path / "y.bin", np.float32)).view(rows, 256)
        torch.testing.assert_close(y, model(x).detach(), rtol=1e-5, atol=1e-5)


def test_errors_of_the_program(package: Path, runner: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(bytes(1023))
    ops, x, y = _library.TORCH_OPS, tmp_path / "x.bin", tmp_path / "y.bin"
    for arguments, status, message in [
        ((package,), 2, "usage: aoti_runner"),
        ((package, tmp_path / "none.so", x, y), 1, "none.so: cannot open shared object file"),
        ((package, ops, x, y), 1, "x.bin: expected rows of 256 fp32 values, got 1023 bytes"),
        ((package, ops, tmp_path / "none.bin", y), 1, "none.bin: cannot be read"),
    ]:
        done = run(runner, *arguments)
        assert done.returncode == status
        assert message in done.stderr
    assert not y.exists()


def test_the_program_needs_no_python(runner: Path) -> None:
    libraries = subprocess.run(["ldd", str(runner)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu.so => " in libraries
    assert "libpython" not in libraries


@pytest.mark.gpu
def test_package_on_the_gpu(tmp_path: Path) -> None:
    done = run(sys.executable, FOLDER / "export.py", tmp_path / "model.pt2", "--device", "cuda")
    assert done.returncode == 0, done.stderr
    compiled, model = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2")), example_model().cuda()
    for rows in (1, 5, 70):
        x = torch.randn(rows, 256, device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
