"""Every snippet of docs/*.md is run by a test."""

from __future__ import annotations

import pytest
from docs_cases import ROOT, snippets

# page: the file that runs its snippets, and their languages. A snippet more is a test more there, or a change of one.
PAGES = {
    "accelerate": ("test_docs_accelerate", ["python"] * 4),
    "architecture": ("test_docs_architecture", ["sh"]),
    "benchmarking": ("test_docs_benchmarking", ["sh"] * 4),
    "extending": ("test_docs_extending", ["cpp"] * 3),
    "loading": ("test_loading_docs", ["sh", "python"]),
    "parallel": ("test_docs_training", ["python"] * 5),
    "performance": ("test_docs_performance", ["sh"] * 5),
    "profiling": ("test_docs_profiling", ["sh", "json"]),
    "serving": ("test_docs_serving", ["sh", "cmake", "cpp", "sh"]),
    "training": ("test_docs_training", ["python"] * 4),
    "transformers": ("test_docs_transformers", ["python", "python", "sh", "python", "python", "python"]),
}


def languages(page: str) -> list[str]:
    """Of its snippets; ``text`` is a drawing."""
    return [language for language, _ in snippets(f"docs/{page}.md") if language != "text"]


def test_every_page_with_snippets_has_its_test() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {page for page in pages if languages(page)} == PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_every_snippet_has_its_test(page: str) -> None:
    file, expected = PAGES[page]
    assert languages(page) == expected
    assert f"docs/{page}.md" in (ROOT / "tests" / f"{file}.py").read_text()
