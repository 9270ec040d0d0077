"""Where a command writes a file or a model folder: what it may replace, and the swap of a whole folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import click

from ..checkpoint import sync_folder


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """A usage error unless OUT can be written. Before that, what a swap that was killed has left is put right."""
    if source.is_dir():
        _recover(target.resolve())
    if target.exists() and target.resolve() == source.resolve():
        raise click.UsageError("OUT: is the same as IN")
    if target.exists() and target.is_dir() != source.is_dir():
        kind = "folder" if source.is_dir() else "file"
        raise click.UsageError(f"OUT: {target}: expected a {kind}, as IN is one")
    if target.exists() and not overwrite and not _is_empty(target):
        raise click.UsageError(f"OUT: {target}: exists; use --overwrite to replace it")
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise click.UsageError("OUT: lies inside IN")
    if not target.absolute().parent.is_dir():
        raise click.UsageError(f"OUT: {target.parent}: no such folder")
    if target.is_dir() and target.resolve().is_mount():
        raise click.UsageError(f"OUT: {target}: is a mount point, which cannot be replaced; name a folder inside it")


def check_other_weights(target: Path, names: Iterable[str]) -> None:
    """Raise ValueError if the folder holds weights that are not among the output's files ``names``."""
    stale = {f.name for f in target.glob("*.safetensors*")} - set(names)
    if stale:
        raise ValueError(f"{target}: holds weights that are not part of the output: {', '.join(sorted(stale))}")


def replace_folder(staging: Path, target: Path) -> None:
    """Put a finished folder in the place of ``target``, beside which it lies; other files of ``target`` are kept.

    At any time there is the old folder or the new one under the name, but for an instant between two renames: a run
    that is killed there leaves the old one as ``.<name>.pyquant-old``, and the next run puts it back.
    """
    if not target.exists() or _is_empty(target):
        os.replace(staging, target)
    else:
        linked = _link_others(target, staging)
        old = _away(target)
        try:
            os.replace(target, old)
            try:
                os.replace(staging, target)
            except BaseException:
                os.replace(old, target)
                raise
        except BaseException:
            for path in linked:  # a later run writes to this folder, and must not write to the files of the other
                path.unlink()
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not any(target.iterdir())


def _away(target: Path) -> Path:
    return target.with_name(f".{target.name}.pyquant-old")


def _recover(target: Path) -> None:
    old = _away(target)
    if old.is_dir() and (not target.exists() or _is_empty(target)):
        os.replace(old, target)
    elif old.is_dir():
        shutil.rmtree(old, ignore_errors=True)


def _link_others(target: Path, staging: Path) -> list[Path]:
    """Have in ``staging`` what only ``target`` has; the files that were added."""
    added: list[Path] = []

    def link(source: str, copy: str) -> None:
        added.append(Path(copy))
        try:
            os.link(source, copy)
        except OSError:  # a file system without links
            shutil.copy2(source, copy)

    def present(folder: str, names: list[str]) -> list[str]:
        own, other = Path(folder), staging / Path(folder).relative_to(target)
        return [n for n in names if os.path.lexists(other / n) and not ((other / n).is_dir() and (own / n).is_dir())]

    shutil.copytree(target, staging, symlinks=True, ignore=present, copy_function=link, dirs_exist_ok=True)
    return added
