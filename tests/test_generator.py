"""The generator: a pure function of the table and the instance list, and what the library was built from."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from table_data import bucket, entry, table

from pyquant import _library
from pyquant.formats import FORMATS
from pyquant.tables import read_table
from pyquant.tables.check import problems_of

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "kernels" / "generate.py"
BUILT = ROOT / "build" / "cmake" / "generated"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(out: Path, hash_seed: int = 0) -> None:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, str(SCRIPT), str(out)], check=True, env=environment, cwd=out.parent)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_output_is_deterministic(tmp_path: Path, generate: ModuleType) -> None:
    """Equal bytes whatever the hash seed; the same as from within a process."""
    run(tmp_path / "a", 1)
    run(tmp_path / "b", 2)
    first = content(tmp_path / "a")
    assert len(first) > 0
    assert first == content(tmp_path / "b")
    assert first == {name: text.encode() for name, text in generate.outputs().items()}


def test_files_are_written_only_when_changed(tmp_path: Path, generate: ModuleType) -> None:
    generate.main(tmp_path)
    files = sorted(tmp_path.iterdir())
    assert files
    for file in files:
        os.utime(file, ns=(1, 1))
    damaged = files[0]
    good = damaged.read_text()
    damaged.write_text(good + "// changed\n")
    generate.main(tmp_path)
    assert damaged.read_text() == good
    assert {f: f.stat().st_mtime_ns for f in files if f != damaged} == dict.fromkeys(files[1:], 1)


def test_tables_are_built_in(tmp_path: Path, generate: ModuleType) -> None:
    """Every table that is shipped is valid, and what the generator writes is its JSON."""
    content = table(entry(512), entry(1024))
    path = tmp_path / "table.json"
    path.write_text(content.to_json())
    text = generate.tables([path])
    assert re.findall(r'^    "(\w+)",$', text, re.MULTILINE) == [i.name for i in generate.instances.INSTANCES]
    pieces = re.findall(r'R"json\((.*?)\)json"', text, re.DOTALL)
    assert json.loads("".join(pieces)) == json.loads(content.to_json())
    assert len(pieces) == 2
    for shipped in generate.table_files():
        assert not list(problems_of(read_table(shipped)))


def test_a_table_with_an_unknown_instance_stops_the_build(tmp_path: Path, generate: ModuleType) -> None:
    path = tmp_path / "table.json"
    path.write_text(table(entry(512), entry(1024, 512, bucket(1, None, "cuda_fast"))).to_json())
    with pytest.raises(ValueError, match=r"entries\[1\]: no instance is called cuda_fast"):
        generate.tables([path])


def test_usage_without_a_folder() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode != 0
    assert "OUT_DIR" in result.stderr


def test_generator_needs_no_package() -> None:
    """The build reads formats.py before torch is there."""
    code = f"import sys; sys.modules['torch'] = None; import runpy; runpy.run_path({str(SCRIPT)!r})"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0


def test_instance_names(generate: ModuleType) -> None:
    """A name is <device>_<family>[_<variant>], is unique, and that of a CPU instance names its file."""
    names = [i.name for i in generate.instances.INSTANCES]
    assert len(names) == len(set(names)) > 0
    assert all(re.fullmatch(r"(cpu|cuda)_[a-z0-9]+(_[a-z0-9_]+)?", name) for name in names)
    sources = {name for name in generate.outputs() if name.endswith(".gen.cpp")}
    assert sources == {f"{i.name}.gen.cpp" for i in generate.instances.CPU_INSTANCES}


def test_every_source_is_built_once_with_its_flags(generate: ModuleType) -> None:
    cmake = generate.outputs()["sources.cmake"]
    built = re.findall(r'list\(APPEND CX_INSTANCE_SOURCES "\$\{CX_GENERATED_DIR\}/(\S+)"\)', cmake)
    flags = dict(re.findall(r'\}/(\S+)" PROPERTIES COMPILE_OPTIONS "([^"]*)"', cmake))
    assert built == [f"{i.name}.gen.cpp" for i in generate.instances.CPU_INSTANCES]
    for i in generate.instances.CPU_INSTANCES:
        assert flags[f"{i.name}.gen.cpp"] == ";".join(generate.instances.CPU_ISA_FLAGS[i.variant])


def test_every_family_has_a_portable_instance(generate: ModuleType) -> None:
    """The dispatch ends there on any machine."""
    cpu = generate.instances.CPU_INSTANCES
    assert {i.family for i in cpu if i.variant == "portable"} == {i.family for i in cpu} != set()
    available = {i["name"] for i in _library.instances() if i["available"]}
    assert {i.name for i in cpu if i.variant == "portable"} <= available


def test_manifest_order_is_the_librarys(generate: ModuleType) -> None:
    declared = [i.name for i in generate.instances.INSTANCES]
    assert re.findall(r"^    &(\w+),$", generate.manifest(), re.MULTILINE) == declared
    cuda = _library.build_info()["cuda"].startswith("on")
    built = generate.instances.INSTANCES if cuda else generate.instances.CPU_INSTANCES
    assert [i["name"] for i in _library.instances()] == [i.name for i in built]
    assert [i["device"] for i in _library.instances()] == [i.device for i in built]


def test_table_has_every_row_with_exact_codebooks(generate: ModuleType) -> None:
    header = generate.format_table()
    assert re.findall(r'^    \{(\d+), "(\w+)", (\d+),', header, re.MULTILINE) == [
        (str(f.id), f.name, str(f.bits)) for f in FORMATS.values()
    ]
    codebooks = dict(re.findall(r"kCodebook_(\w+)\[\] = \{([^}]*)\}", header))
    assert codebooks.keys() == {name for name, f in FORMATS.items() if f.codebook is not None}
    for name, values in codebooks.items():
        assert tuple(float.fromhex(v.removesuffix("f")) for v in values.split(", ")) == FORMATS[name].codebook


@pytest.mark.skipif(not BUILT.is_dir(), reason="the libraries were not built in this tree")
def test_the_build_used_the_current_output(generate: ModuleType) -> None:
    built = content(BUILT)
    assert {name: built.get(name, b"").decode() for name in generate.outputs()} == generate.outputs()
