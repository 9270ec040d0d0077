"""The CSV of ``pyquant profile``: its columns, and a file that one profiler at a time adds to."""

from __future__ import annotations

import datetime
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from ..bench.environment import Environment

if TYPE_CHECKING:
    import pandas as pd

NOT_SUPPORTED, FAILED = "not supported", "failed"
NOT_VERIFIED = "not verified"


@dataclass(frozen=True)
class _Figures:
    """The columns of a row without those of its run."""

    m: int  # tokens
    n: int  # out_features
    k: int  # in_features
    format: str
    group_size: int | None
    dtype: str
    bias: bool
    cache: str  # cold: every call on another copy of the weight; hot: all on one
    launch: str  # graph, stream, host: see Setting
    provider: str
    instance: str
    disposition: str  # passed, incorrect, not supported, failed, not verified
    reason: str  # why it is not supported or failed
    us: float | None  # per call: the median
    us_p10: float | None
    us_p90: float | None
    copies: int | None  # of the weight, in turns
    weight_bytes: int | None
    gb_per_s: float | None  # weight_bytes / us
    tflops: float | None  # 2 M N K / us
    floor_us: float | None  # reading weight_bytes and nothing else; GPU only
    floor_fraction: float | None
    ratio_to_cublas: float | None  # 2: twice as fast as F.linear on the dequantized weight; GPU only
    error: float | None  # norm of y - reference over the norm of the reference
    processors: int  # SMs; on a CPU threads


@dataclass(frozen=True)
class ProfileRow(Environment, _Figures):
    """One instance on one problem; the fields are the CSV's columns, None its empty cells.

    ``command`` measures this row again.
    """


COLUMNS = [field.name for field in fields(ProfileRow)]
KEY = ["m", "n", "k", "format", "dtype", "bias", "cache", "launch", "instance"]


class ProfileFile:
    """A CSV that rows are added to; each is on the disk when :meth:`write` returns. Made by :func:`open_profile`."""

    def __init__(self, path: Path, gpu: str) -> None:
        self.path = path
        self.done: set[tuple[str, ...]] = set()
        if path.exists() and path.stat().st_size:
            frame = _read(path)
            others = sorted(set(frame["gpu"]) - {gpu})
            if others:
                raise ValueError(f"{path}: gpu: expected rows of {gpu}, got {', '.join(others)}")
            self.done = set(frame[KEY].itertuples(index=False, name=None))

    def write(self, row: ProfileRow) -> None:
        import pandas as pd

        new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            pd.DataFrame([asdict(row)], columns=COLUMNS).to_csv(file, header=new, index=False)


@contextmanager
def open_profile(path: Path, gpu: str) -> Iterator[ProfileFile]:
    """The file, for rows of the device ``gpu``; others who want it are told who has it.

    Raises:
        BlockingIOError: another process has it; the message says which.
        ValueError: it has other columns, or rows of another device.
    """
    with Path(f"{path}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise BlockingIOError(f"{path}: in use by {lock.read().strip() or 'another process'}") from error
        lock.truncate(0)
        started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
        lock.flush()
        try:
            yield ProfileFile(path, gpu)
        finally:
            lock.truncate(0)


def _read(path: Path) -> pd.DataFrame:
    """The rows so far. A last line that an interruption left without an end is taken off the file."""
    import pandas as pd

    content = path.read_bytes()
    if not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if list(frame.columns) != COLUMNS:
        wrong = sorted(set(frame.columns) ^ set(COLUMNS)) or ["their order"]
        raise ValueError(f"{path}: expected the columns of `pyquant profile`; different: {', '.join(wrong)}")
    return frame
