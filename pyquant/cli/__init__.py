"""The command line: ``pyquant quantize | verify | info``."""

from .app import main

__all__ = ["main"]
