"""Benchmarks that train run as they are called, with small numbers; what they measure is nobody's test."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SMALL = {
    "step": ["--batch", "8", "--rows", "300", "--steps", "1", "--rounds", "1", "--workers", "1", "--stem", "tiny"],
    "device": ["--device", "cpu", "--batch", "4", "--side", "32", "--images", "16", "--rows", "5000", "--clusters", "9",
               "--steps", "1", "--repeats", "1", "--arch", "resnet18"],
}  # fmt: skip


def call(root: Path, name: str, *words: object) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", f"benchmarks.{name}", *map(str, words)]
    return subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_training_benchmark_runs(name: str, root: Path, tmp_path: Path) -> None:
    done = call(root, name, *SMALL[name], "--out", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    times = [cell["median_ms"] for cell in json.loads((tmp_path / "out.json").read_text())["results"].values()]
    assert len(times) > 2
    assert min(times) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_here_is_said_in_one_line(root: Path) -> None:
    done = call(root, "device")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("torch finds no CUDA device here; use cpu, or another machine")
    assert "Traceback" not in done.stderr
