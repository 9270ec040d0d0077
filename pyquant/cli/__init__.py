"""The command line: ``pyquant quantize | convert | verify | bench | info``."""

from .app import main

__all__ = ["main"]
