"""Exit codes that several commands have beside click's."""

from __future__ import annotations

import click
import torch

NO_GPU = 3
INTERRUPTED = 130  # as shells report SIGINT


def require_gpu(instead: str) -> None:
    """Say so and exit with NO_GPU unless torch finds a GPU; ``instead``: what can be done without one."""
    if torch.cuda.is_available():
        return
    reason = "is built without CUDA" if torch.version.cuda is None else "finds none"
    click.echo(f"Error: no NVIDIA GPU: this torch {reason}; {instead}", err=True)
    raise click.exceptions.Exit(NO_GPU)
