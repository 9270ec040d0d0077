"""scripts/check_wheel.py on the libraries built here, and on what it must refuse; `make wheel` runs all of it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

from pyquant import _library

for package in ("auditwheel", "torch_abi_audit"):
    pytest.importorskip(package, reason="needs the extra dev")

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = [_library.LIBRARY, _library.TORCH_OPS]
OLDEST = Version("2.11")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "scripts" / "check_wheel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_wheel = load_script()


def compiled(path: Path, symbol: str = "", *options: str) -> Path:
    """A shared library that calls ``symbol``, whoever has it."""
    body = f"void {symbol}(void); void call(void) {{ {symbol}(); }}" if symbol else "void callee(void) {}"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", *options, "-o", str(path)]
    subprocess.run(command, input=body, text=True, check=True)
    return path


def make_wheel(folder: Path, *libraries: Path, tag: str = "py3-none-linux_x86_64", torch: str = ">=2.11") -> Path:
    """A wheel of nothing but libraries."""
    path = folder / f"pyquant-0.1.0-{tag}.whl"
    requirement = f"Requires-Dist: torch{torch}\n" if torch else ""
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: pyquant\nVersion: 0.1.0\n{requirement}",
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n",
    }
    with zipfile.ZipFile(path, "w") as file:
        for library in libraries:
            file.write(library, f"pyquant/lib/{library.name}")
        for name, text in info.items():
            file.writestr(f"pyquant-0.1.0.dist-info/{name}", text)
        record = "".join(f"{name},,\n" for name in [*file.namelist(), "pyquant-0.1.0.dist-info/RECORD"])
        file.writestr("pyquant-0.1.0.dist-info/RECORD", record)
    return path


def test_symbols_of_the_libraries() -> None:
    found = check_wheel.check_symbols(LIBRARIES, OLDEST)
    shims = re.match(r"(\d+) symbols of torch's stable ABI, all in torch 2.11.0 and newer; none of CPython", found)
    assert shims
    assert int(shims[1]) > 30


@pytest.mark.parametrize(
    ("symbol", "message"),
    [
        ("_ZN3c1010TensorImpl4stopEv", "expected symbols of torch's stable ABI only, got c10::TensorImpl::stop"),
        ("torch_library_def_with_tags", "expected symbols of torch 2.11, got torch_library_def_with_tags of 2.12.0"),
        ("torch_no_such_shim", "torch-abi-audit does not know torch_no_such_shim"),
        ("PyErr_Clear", "expected no symbol of CPython, got those of its stable ABI"),
        ("_PyRuntime_Finalize", "expected no symbol of CPython, got _PyRuntime_Finalize"),
    ],
)
def test_symbols_that_are_refused(tmp_path: Path, symbol: str, message: str) -> None:
    library = compiled(tmp_path / "other.so", symbol)
    with pytest.raises(check_wheel.WheelError, match=re.escape(f"other.so: {message}")):
        check_wheel.check_symbols([*LIBRARIES, library], OLDEST)


def test_a_wheel_without_the_operators_is_refused() -> None:
    with pytest.raises(check_wheel.WheelError, match=r"expected torch's symbols in one of libcutlass_ext.so, got none"):
        check_wheel.check_symbols([_library.LIBRARY], OLDEST)


def test_repair_bundles_nothing(tmp_path: Path) -> None:
    repaired = check_wheel.repair(make_wheel(tmp_path, *LIBRARIES), tmp_path / "out")
    assert re.fullmatch(r"pyquant-0\.1\.0-py3-none-manylinux_2_\d+_x86_64\.whl", repaired.name)
    assert list((tmp_path / "out").iterdir()) == [repaired]
    with zipfile.ZipFile(repaired) as file:
        stored = {n: file.read(n) for n in file.namelist() if n.endswith(".so")}
    assert stored == {f"pyquant/lib/{path.name}": path.read_bytes() for path in LIBRARIES}


def test_a_foreign_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = compiled(tmp_path / "libforeign.so", "", "-Wl,-soname,libforeign.so")
    library = compiled(tmp_path / "user.so", "callee", f"-L{tmp_path}", "-lforeign")
    monkeypatch.setenv("AUDITWHEEL_LD_LIBRARY_PATH", str(foreign.parent))
    with pytest.raises(check_wheel.WheelError, match=r"auditwheel would bundle pyquant\.libs/libforeign"):
        check_wheel.repair(make_wheel(tmp_path, library), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("tag", ["cp311-cp311-linux_x86_64", "py3-none-any", "cp310-abi3-linux_x86_64"])
def test_tags_that_are_refused(tag: str) -> None:
    with pytest.raises(check_wheel.WheelError, match=f"expected py3-none-linux_\\*, got {tag}"):
        check_wheel.check_tags(Path(f"pyquant-0.1.0-{tag}.whl"), "linux_")


def test_required_torch(tmp_path: Path) -> None:
    assert check_wheel.required_torch(make_wheel(tmp_path, torch=">=2.11,<9")) == OLDEST
    for torch in ("", "<9"):
        with pytest.raises(check_wheel.WheelError, match=r"expected a requirement torch>=\.\., got none"):
            check_wheel.required_torch(make_wheel(tmp_path, torch=torch))


def test_a_package_that_does_not_work(tmp_path: Path) -> None:
    """Another pyquant on the path does not stand in for it."""
    (tmp_path / "pyquant").mkdir()
    (tmp_path / "pyquant" / "__init__.py").write_text("raise ImportError('broken')")
    with pytest.raises(check_wheel.WheelError, match=r"installed, it does not work: (.|\n)*broken"):
        check_wheel.check_works(tmp_path)
    shutil.rmtree(tmp_path / "pyquant")
    with pytest.raises(check_wheel.WheelError, match="installed, it does not work"):
        check_wheel.check_works(tmp_path)


def test_source_distribution(tmp_path: Path) -> None:
    """All sources that git knows, and no library or other file of this build."""
    pytest.importorskip("build", reason="needs the extra dev")
    if not (ROOT / ".git").exists():
        pytest.skip("needs a clone: git says what the sources are")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("pyquant-*.tar.gz"))) as file:
        packed = {name.split("/", 1)[1] for name in file.getnames() if "/" in name and file.getmember(name).isfile()}
    sources = ["cutlass_ext", "kernels", "pyquant", "setup.py", "pyproject.toml", "README.md", "profiles/*/table.json"]
    tracked = subprocess.run(["git", "ls-files", *sources], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = set(tracked.stdout.splitlines())
    assert len(expected) > 100
    assert expected <= packed, expected - packed
    of_setuptools = {name for name in packed - expected if name.startswith("pyquant.egg-info/")}
    assert packed - expected - of_setuptools == {"MANIFEST.in", "PKG-INFO", "setup.cfg"}
