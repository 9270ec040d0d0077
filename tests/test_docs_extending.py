"""The snippets of docs/extending.md, put where the page says and compiled to PTX; no GPU runs what comes out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from docs_cases import ROOT, blocks

TILE, ENCODING, EPILOGUE = blocks("docs/extending.md", "cpp")
SOURCES = ROOT / "kernels" / "cuda" / "wgmma"


def cutlass_include() -> Path | None:
    """Where the build finds CUTLASS: beside the environment, or in the package."""
    homes = [Path(os.environ["CUTLASS_HOME"])] if "CUTLASS_HOME" in os.environ else []
    homes.append(Path(sys.prefix) / "cutlass" / "cutlass_library" / "source")
    if (package := find_spec("cutlass_library")) is not None and package.origin is not None:
        homes.append(Path(package.origin).parent / "source")
    return next((home / "include" for home in homes if (home / "include" / "cute").is_dir()), None)


pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
    pytest.mark.skipif(cutlass_include() is None, reason="needs CUTLASS"),
]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, ROOT / "kernels" / "generate.py", folder], check=True)
    return folder


def ptx(folder: Path, generated: Path, body: str) -> str:
    """What nvcc makes of code in the namespace of wgmma; headers in ``folder`` come before the repository's."""
    source = folder / "snippet.cu"
    namespace = "cutlass_ext::cuda::wgmma"
    source.write_text(f'#include "kernels/cuda/wgmma/launch.cuh"\nnamespace {namespace} {{\n{body}\n}}\n')
    include = [f"-I{path}" for path in (folder, ROOT, generated, cutlass_include())]
    target = ["-std=c++17", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=compute_90a", "-rdc=true"]
    command = ["nvcc", *target, "-ptx", *include, str(source), "-o", str(folder / "snippet.ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (folder / "snippet.ptx").read_text()


def test_a_tile_of_an_encoding_of_your_own(tmp_path: Path, generated: Path) -> None:
    """The line of the tile in a function like ``add_tiles``, for the page's policy and for one that exists."""
    body = f"""
{ENCODING}
template <template <class, Scaling, int> class Codes, class T, Scaling kScaling>
void add_tiles_of_the_page(Candidates* list) {{
  {TILE}
}}
template void add_tiles_of_the_page<MyCodes, __nv_bfloat16, Scaling::kPerBlock>(Candidates*);
template void add_tiles_of_the_page<IntegerCodes, __half, Scaling::kFine>(Candidates*);
static_assert(!MyCodes<__half, Scaling::kFused, 0>::kCanFuse);
"""
    made = ptx(tmp_path, generated, body)
    types = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n96k16\.f32\.(\w+)\.", made)
    assert set(types) == {"bf16", "f16"}
    # The page's policy is declared only: its functions are what the kernel asks others for.
    asked = re.findall(r"^\.extern \.func .*MyCodes.*?(decode|stored_scale|stored_zero)E", made, flags=re.M)
    assert set(asked) == {"decode", "stored_scale", "stored_zero"}
    assert "add_tiles(Candidates* list)" in (SOURCES / "launch.cuh").read_text()


def test_a_step_of_the_epilogue(tmp_path: Path, generated: Path) -> None:
    """The tree in place of the one in epilogue.cuh, and its parameters in the constructor, as the comment says."""
    *tree, comment = EPILOGUE.splitlines()
    place, parameters = re.fullmatch(r"// (in the constructor): (tree_params\{.*\})", comment).groups()
    original = (SOURCES / "epilogue.cuh").read_text()
    changed, trees = re.subn(r"  using Tree =\n.*?;\n", "\n".join(tree) + "\n", original, flags=re.S)
    changed, places = re.subn(r": tree_params\{.*\},\n", f": {parameters},\n", changed)
    names = "using namespace cutlass::epilogue::fusion;"  # the page leaves it out
    changed = changed.replace(
        "namespace cutlass_ext::cuda::wgmma {", f"namespace cutlass_ext::cuda::wgmma {{\n{names}", 1
    )
    assert (place, trees, places) == ("in the constructor", 1, 1)
    header = tmp_path / "changed" / "kernels" / "cuda" / "wgmma" / "epilogue.cuh"
    header.parent.mkdir(parents=True)
    header.write_text(changed)
    kernel = "template Compiled compiled<Config<IntegerCodes<__nv_bfloat16, Scaling::kPerBlock, 64>, 64, 1, 4>>();"
    (tmp_path / "plain").mkdir()
    plain, with_activation = (ptx(tmp_path / name, generated, kernel) for name in ("plain", "changed"))
    exponential = r"ex2\.approx|tanh\.approx"
    assert re.search(exponential, plain) is None
    assert re.search(exponential, with_activation) is not None
