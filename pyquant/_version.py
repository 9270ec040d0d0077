"""The version of pyquant, read by the build too."""

__version__ = "0.1.0"
