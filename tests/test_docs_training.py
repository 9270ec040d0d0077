"""The snippets of docs/training.md and docs/parallel.md run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from docs_cases import blocks


def succeed(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training(tmp_path: Path) -> None:
    """One after the other, as one program."""
    pytest.importorskip("peft", reason="needs peft")
    pytest.importorskip("transformers", reason="needs transformers")
    snippets = blocks("docs/training.md", "python")
    assert len(snippets) == 4
    output = succeed([sys.executable, "-c", "\n".join(snippets)], tmp_path)
    assert "trainable params" in output
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


def test_training_without_peft(tmp_path: Path) -> None:
    *_, without, transposed = blocks("docs/training.md", "python")
    output = succeed([sys.executable, "-c", f"import torch\nimport pyquant\n{without}\n{transposed}"], tmp_path)
    assert "cpu_dequant_" in output


def test_one_process(tmp_path: Path) -> None:
    local = [block for block in blocks("docs/parallel.md", "python") if not block.startswith("# torchrun")]
    assert len(local) == 3
    checks = "assert rows.shape == (256, 256) and columns.shape == (512, 128) and part.shape == (512, 128)"
    succeed([sys.executable, "-c", "\n".join([*local, checks])], tmp_path)
    assert (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("index", [0, 1], ids=["tensor parallelism", "fsdp2"])
def test_two_processes(index: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() == 1:
        pytest.skip("the pages take a GPU for each of two ranks where there is one")
    scripts = [block for block in blocks("docs/parallel.md", "python") if block.startswith("# torchrun")]
    assert len(scripts) == 2
    (tmp_path / "script.py").write_text(f"{scripts[index]}\nprint('the end', flush=True)\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.count("the end") == 2, done.stderr
    assert done.stdout.count("256x256") == (2 if index == 0 else 0)
    # Behind the script's last line a process may abort with these words, of a std::thread that nobody joined: 3 of 68
    # runs of the first script on a busy machine did, all at one moment (torch 2.13, gloo); the cause was not found.
    # pyquant has no std::thread.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
