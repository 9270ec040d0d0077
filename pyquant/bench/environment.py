"""Where figures come from: GPU, driver, clocks, versions, commit, date, command line."""

from __future__ import annotations

import datetime
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from .._version import __version__

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Environment:
    """Columns that are equal in all rows of a run, the last ones of every CSV: rows inherit them."""

    gpu: str  # the device: a GPU's name, or the CPU's model
    driver: str
    sm_clock_mhz: int | None  # under load
    mem_clock_mhz: int | None
    torch: str
    cuda: str
    pyquant: str
    commit: str
    date: str
    command: str


def read_environment() -> Environment:
    """Of the current CUDA device; clocks are read while the GPU computes, since idle ones say nothing."""
    return _environment(torch.cuda.get_device_name(), *_query_under_load())


def read_cpu_environment(name: str) -> Environment:
    """Of the CPU called ``name``, in the columns of GPUs."""
    return _environment(name, "", None, None)


def _environment(name: str, driver: str, sm_clock: int | None, mem_clock: int | None) -> Environment:
    return Environment(
        gpu=name,
        driver=driver,
        sm_clock_mhz=sm_clock,
        mem_clock_mhz=mem_clock,
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        pyquant=__version__,
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["pyquant", *sys.argv[1:]]),
    )


def commit() -> str:
    """Short hash of the repository that this package lies in, with ``+dirty`` if files differ from it; else
    ``PYQUANT_COMMIT`` of the environment; else ""."""
    if _git("rev-parse", "--show-toplevel") == str(_ROOT):
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return f"{_git('rev-parse', '--short', 'HEAD')}{'+dirty' if changed else ''}"
    return os.environ.get("PYQUANT_COMMIT", "")


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's folder; None if it fails or there is no git."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _query_under_load() -> tuple[str, int | None, int | None]:
    """Driver version, SM and memory clock in MHz, by nvidia-smi; "" and None where it does not say.

    The load also brings the clocks up before the first measurement.
    """
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)
    # By UUID: nvidia-smi does not know CUDA_VISIBLE_DEVICES.
    gpu = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    query = [
        "nvidia-smi",
        f"--id={gpu}",
        "--query-gpu=driver_version,clocks.sm,clocks.mem",
        "--format=csv,noheader,nounits",
    ]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return "", None, None
    while process.poll() is None:
        for _ in range(10):
            torch.mm(a, a)
        torch.cuda.synchronize()
    assert process.stdout is not None
    cells = [cell.strip() for cell in process.stdout.read().split(",")]
    if process.returncode != 0 or len(cells) != 3:
        return "", None, None
    sm_clock, mem_clock = (int(cell) if cell.isdigit() else None for cell in cells[1:])
    return cells[0], sm_clock, mem_clock
