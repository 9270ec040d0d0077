"""The command line: ``pyquant quantize | verify | bench | info``."""

from .app import main

__all__ = ["main"]
