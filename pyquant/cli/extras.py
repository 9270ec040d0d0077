"""Packages of the extra ``profile``, which few commands need."""

from __future__ import annotations

import importlib


def require_profile(*modules: str) -> None:
    """Raise ValueError, saying what to install, unless ``modules`` can be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"needs {module}: pip install 'pyquant[profile]' ({error})") from error
