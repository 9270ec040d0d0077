"""The extras of pyproject.toml: messages and documents name those that exist, and what the tests ran with fits them."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11 or newer, to read pyproject.toml")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
TEXTS = [f for folder in ("docs", "examples", "pyquant") for f in sorted((ROOT / folder).rglob("*.[mp][dy]"))]
HINT = re.compile(r"pip install (\S*)pyquant(?:\[([\w,]*)\])?(\S*)")


def hints() -> list[tuple[str, str, str]]:
    """(file, what pip would get, extras) wherever a text says to install pyquant."""
    files = [ROOT / "README.md", *TEXTS]
    return [(f.name, m[0], m[2]) for f in files for m in HINT.finditer(f.read_text()) if m[2]]


def test_extras_that_users_ask_for() -> None:
    assert EXTRAS.keys() == {"hf", "train", "profile", "demo", "dev"}


def test_every_hint_names_an_extra_and_survives_a_shell() -> None:
    found = hints()
    assert len(found) >= 8
    for file, command, extras in found:
        assert set(extras.split(",")) <= EXTRAS.keys(), (file, command)
        assert f"pip install 'pyquant[{extras}]'" in command, f"{file}: {command}: brackets are globs in zsh"


def test_what_is_missing_is_said_with_its_extra() -> None:
    code = "import sys; sys.modules['peft'] = None; import pyquant.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: pyquant.peft: expected peft 0.21 or newer" in done.stderr
    assert done.stderr.strip().endswith("pip install 'pyquant[train]'")


def test_profile_has_what_commands_ask_for() -> None:
    sources = "".join(f.read_text() for f in (ROOT / "pyquant" / "cli").glob("*.py"))
    asked = {
        name for call in re.findall(r"require_profile\((\".*?)\)", sources) for name in re.findall(r'"(\w+)"', call)
    }
    assert len(asked) >= 4
    assert asked <= {Requirement(r).name for r in EXTRAS["profile"]}


@pytest.mark.parametrize("extra", EXTRAS)
def test_installed_packages_are_within_the_bounds(extra: str) -> None:
    """Those of ``extra`` that are installed here; pytest itself is one of ``dev``."""
    missing = []
    for requirement in map(Requirement, EXTRAS[extra]):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        if requirement.name == "pyquant":
            assert requirement.extras <= EXTRAS.keys()
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(requirement.name)
            continue
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}: {installed} is installed"
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
