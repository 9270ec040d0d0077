"""--overwrite of a model folder: the old one or the new one, whatever fails in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from test_convert import write_model

from pyquant.cli import main, output_folder
from pyquant.cli.output_folder import check_target, replace_folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A finished folder, and one with other files to take the place of."""
    staging, target = tmp_path / ".out.partial", tmp_path / "out"
    for folder, text in ((staging, b"new"), (target, b"old")):
        (folder / "sub").mkdir(parents=True)
        for name in ("model.safetensors", "config.json", "sub/a.txt"):
            (folder / name).write_bytes(text)
    (target / "sub" / "mine.txt").write_bytes(b"mine")
    (target / "notes.txt").write_bytes(b"mine")
    (target / "link").symlink_to("notes.txt")
    target.chmod(0o750)
    return staging, target


NEW = {"model.safetensors": b"new", "config.json": b"new", "sub/a.txt": b"new"}
MINE = {"sub/mine.txt": b"mine", "notes.txt": b"mine", "link": b"mine"}


def test_the_whole_folder_is_replaced(folders: tuple[Path, Path]) -> None:
    staging, target = folders
    replace_folder(staging, target)
    assert files(target) == NEW | MINE
    assert (target / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750
    assert [f.name for f in target.parent.iterdir()] == ["out"]


def renames(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call ``before`` with the number of each rename of a folder."""
    replace, count = os.replace, -1

    def counted(source: Path, target: Path) -> None:
        nonlocal count
        if Path(source).is_dir():
            count += 1
            before(count)
        replace(source, target)

    monkeypatch.setattr(output_folder.os, "replace", counted)


def test_there_is_always_a_complete_folder(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first rename and after each."""
    staging, target = folders
    old = files(target)
    seen: list[tuple[bool, dict[str, bytes]]] = []

    def look(count: int) -> None:
        place = target if target.exists() else target.with_name(".out.pyquant-old")
        seen.append((staging.exists(), files(place)))

    renames(monkeypatch, look)
    replace_folder(staging, target)
    assert seen == [(True, old), (True, old)]
    assert files(target) == NEW | MINE


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_leaves_both_as_they_were(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    staging, target = folders
    old, new = files(target), files(staging)

    def fail(count: int) -> None:
        if count == failing:
            raise PermissionError("no")

    renames(monkeypatch, fail)
    with pytest.raises(PermissionError):
        replace_folder(staging, target)
    assert files(target) == old
    assert files(staging) == new, "no links to files of the other folder"
    assert sorted(f.name for f in target.parent.iterdir()) == [".out.partial", "out"]


@pytest.mark.parametrize("created", [False, True])
def test_a_run_that_was_killed_between_the_renames(folders: tuple[Path, Path], created: bool) -> None:
    """The next one puts the old folder back, also where someone has made an empty one since."""
    staging, target = folders
    old = files(target)
    target.rename(target.with_name(".out.pyquant-old"))
    if created:
        target.mkdir()
    with pytest.raises(click.UsageError, match="exists; use --overwrite"):
        check_target(staging, target, overwrite=False)
    assert files(target) == old
    assert not target.with_name(".out.pyquant-old").exists()


def test_a_run_that_was_killed_while_it_deleted_the_old_folder(folders: tuple[Path, Path]) -> None:
    staging, target = folders
    left = target.with_name(".out.pyquant-old")
    shutil.copytree(target, left)
    (left / "notes.txt").unlink()
    expected = files(target)
    check_target(staging, target, overwrite=True)
    assert files(target) == expected
    assert not left.exists()


def test_links_are_not_written_through(folders: tuple[Path, Path]) -> None:
    """What is kept is linked, not copied: weights of other formats are large."""
    staging, target = folders
    before = (target / "notes.txt").stat()
    replace_folder(staging, target)
    after = (target / "notes.txt").stat()
    assert (after.st_ino, after.st_nlink) == (before.st_ino, 1)


def test_a_file_system_without_links(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("not here")

    staging, target = folders
    monkeypatch.setattr(output_folder.os, "link", refused)
    replace_folder(staging, target)
    assert files(target) == NEW | MINE


@pytest.mark.parametrize("command", ["convert", "quantize"])
def test_commands(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing rename leaves the old model; the same command then succeeds, by converting nothing again."""
    source, target = tmp_path / "in", tmp_path / "out"
    if command == "convert":
        write_model(source, "bitsandbytes", 2)
    else:
        source.mkdir()
        save_file({"a.weight": torch.randn(64, 64)}, source / "model.safetensors")
    (tmp_path / "real").mkdir()
    target.symlink_to("real")  # which is followed
    assert run(command, source, target).exit_code == 0
    (target / "notes.txt").write_text("mine")
    first = files(target)
    with monkeypatch.context() as patch:

        def fail(count: int) -> None:
            if count == 1:
                raise PermissionError("no rename today")

        renames(patch, fail)
        failed = run(command, source, target, "--overwrite")
        assert failed.exit_code == 1
        assert "no rename today" in str(failed.exception) + failed.output
    assert files(target) == first
    again = run(command, source, target, "--overwrite")
    assert again.exit_code == 0
    assert ("2 shards were done by an earlier run" in again.output) is (command == "convert")
    assert files(target) == first
    assert target.is_symlink()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["in", "out", "real"]


def test_other_weights_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "in", "bitsandbytes", 2)
    (tmp_path / "out").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "out" / "model.safetensors")
    monkeypatch.setattr("pyquant.cli.convert._write_shard", None)
    result = run("convert", tmp_path / "in", tmp_path / "out", "--overwrite")
    assert result.exit_code == 1
    assert "holds weights that are not part of the output: model.safetensors" in result.stderr
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["a"], torch.ones(1))


def test_a_mount_point(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(click.UsageError, match="is a mount point, which cannot be replaced"):
        check_target(*folders, overwrite=True)
