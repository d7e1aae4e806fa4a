"""Tier `exact` by device: a run keeps its bits when it is repeated, or killed and resumed; another seed differs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mirepro import checkpoint, determinism
from tests.test_pretrain import bytes_of, data

__all__ = ["data"]

PROGRAM = """
import dataclasses, sys, time
from pathlib import Path
from mirepro import checkpoint, determinism, pretrain
from tests.test_pretrain import run
data, work, device, name, seed, seconds = sys.argv[1:]
determinism.configure_torch("exact", 1)
checkpoint.BETWEEN_SECONDS = float(seconds)
begin = pretrain.Trainer.begin
def noted(trainer, epoch):
    with (Path(work) / "begun.txt").open("a") as file:
        print(epoch, file=file)
    if float(seconds) < 0 and epoch == 6:
        time.sleep(600)  # it waits to be killed
    begin(trainer, epoch)
pretrain.Trainer.begin = noted
out = Path(work) / "out"
out.mkdir(parents=True, exist_ok=True)
params = dataclasses.replace(run(name, int(seed), epochs=12, device=device), tier="exact")
pretrain.pretrain(params, Path(data), Path(work), out, "f")
"""
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def start(
    data: Path, work: Path, device: str, name: str, seed: int = 0, seconds: float = 1e9
) -> subprocess.Popen[bytes]:
    """A run in a process of its own, in the tier's environment; a checkpoint every so many seconds.

    With less than 0 seconds it does not get beyond half of its epochs.
    """
    pinned = determinism.environment("portable", 1)
    kept = {key: value for key, value in os.environ.items() if key not in pinned}
    environment = kept | determinism.environment("exact", 1) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [str(data), str(work), device, name, str(seed), str(seconds)]
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], env=environment)


def finished(process: subprocess.Popen[bytes], work: Path) -> dict[str, bytes]:
    """Bytes of what a run wrote."""
    assert process.wait(timeout=300) == 0
    return bytes_of(work / "out")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["ring", "moco_ring"])
def test_repeated_or_killed_and_resumed_a_run_keeps_its_bits(
    name: str, device: str, data: Path, tmp_path: Path
) -> None:
    whole, again, other, killed = (tmp_path / part for part in ("whole", "again", "other", "killed"))
    bits = finished(start(data, whole, device, name), whole)
    process = start(data, killed, device, name, seconds=-1.0)
    end = time.monotonic() + 300
    while not (killed / checkpoint.PREVIOUS).exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed while it trained"
    assert (killed / checkpoint.NAME).exists()
    (killed / "begun.txt").unlink()
    assert finished(start(data, killed, device, name), killed) == bits
    assert int((killed / "begun.txt").read_text().split()[0]) > 0, "it went on from its checkpoint"
    assert finished(start(data, again, device, name), again) == bits
    different = finished(start(data, other, device, name, seed=1), other)
    assert different["encoder.safetensors"] != bits["encoder.safetensors"]
