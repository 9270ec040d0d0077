"""The command line: ``pyquant quantize | convert | verify | bench | profile | table | info``."""

from .app import main

__all__ = ["main"]
