"""The path of a module in the model that runs, for the messages of errors."""

from __future__ import annotations

import sys
from types import FrameType
from typing import cast

from torch import nn


def prefix_path(error: RuntimeError, module: nn.Module) -> None:
    """Put the path of ``module`` before the message of an error that its ``forward`` raised."""
    error.args = (f"{path_of(module)}: {error}",)


def path_of(module: nn.Module) -> str:
    """The path in the outermost module whose methods are running, or that a running function has as ``module``; the
    class where that is the module itself.

    Nothing is recorded for it: it is right wherever the module was put, and costs nothing where there is no error.
    """
    callers: list[nn.Module] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for name in ("self", "module"):
            caller = frame.f_locals.get(name)
            # By type(): asking a lazy proxy for its class may import or build something.
            if issubclass(type(caller), nn.Module) and caller is not module:
                callers.append(cast(nn.Module, caller))
        frame = frame.f_back
    for caller in reversed(callers):
        if "_modules" not in caller.__dict__:
            continue  # its constructor is running
        for name, inner in nn.Module.named_modules(caller):
            if inner is module:
                return name
    return type(module).__name__
