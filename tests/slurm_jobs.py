"""What the jobs of the Slurm tests compute; imported on the nodes."""

import os
import time
from pathlib import Path

from mirepro.errors import UserError


def finish(work: Path) -> None:
    """Leaves a result as `execution.execute` does."""
    (work / "finished").mkdir(parents=True, exist_ok=True)


def fail(work: Path) -> None:
    """An error that is nobody's input."""
    raise ValueError(f"seven is not {work.name}")


def refuse(work: Path) -> None:
    """Bad input."""
    raise UserError("rows.x: impossible; use y")


def one_rank_less(work: Path, refuses: bool) -> None:
    """Rank 1 is lost, by an error or because it refuses its input; rank 0 would wait for it for hours."""
    import submitit

    if not submitit.JobEnvironment().global_rank:
        work.mkdir(parents=True, exist_ok=True)
        (work / "waits").touch()
        time.sleep(7200)
    while not (work / "waits").exists():
        time.sleep(0.1)
    (refuse if refuses else fail)(work)


def count(work: Path, steps: int, seconds: float, stops: int = 1) -> None:
    """Counts to `steps`, one checkpoint each, going on where an earlier run stopped; notes where each run began.

    Only the first `stops` runs pause between the steps: they last until they are stopped, and the next ends at once.
    """
    state = work / "state"
    state.mkdir(parents=True, exist_ok=True)
    (work / "where").write_text(os.environ.get("container", ""))  # noqa: SIM112 (podman sets it)
    checkpoint = state / "step"
    first = int(checkpoint.read_text()) if checkpoint.exists() else 0
    with (work / "runs").open("a") as file:
        file.write(f"{os.environ.get('SLURM_JOB_ID')} {first}\n")
    pauses = len((work / "runs").read_text().splitlines()) <= stops
    for step in range(first, steps):
        time.sleep(seconds if pauses else 0.0)
        fresh = state / ".step"
        fresh.write_text(str(step + 1))
        os.replace(fresh, checkpoint)
    finish(work)


def devices(work: Path) -> None:
    """Notes each rank's node, its number there, which is its device's (`ranks.connect`), and what Slurm gave it."""
    import submitit

    place = submitit.JobEnvironment()
    words = (place.node, place.local_rank, os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    (work / f"rank{place.global_rank}").write_text(" ".join(map(str, words)))
    if place.global_rank == 0:
        finish(work)


def hold(work: Path) -> None:
    """Ends when told to."""
    with (work / "runs").open("a") as file:
        file.write(f"{os.environ.get('SLURM_JOB_ID')} 0\n")
    while not (work / "go").exists():
        time.sleep(0.1)
    finish(work)


def train(work: Path, data: Path) -> None:
    """A small run of four shards; with several tasks, on several ranks."""
    from mirepro import ranks
    from tests import ranks as small

    small.train(str(data), str(work), "ring", "4")
    if ranks.leads():
        finish(work)


def linger(work: Path, data: Path, often: bool, shards: int = 1) -> None:
    """A small run that takes its time unless it resumes; its first steps are noted.

    Checkpoints come every second step if `often`, else only where the job is told to stop.
    """
    import math

    from mirepro import checkpoint, pretrain, ranks
    from tests.test_pretrain import run

    class Slow(pretrain.Trainer):
        def resume(self, saved):
            super().resume(saved)
            self.first = self.step
            with (work / "runs").open("a") as file:
                file.write(f"{os.environ.get('SLURM_JOB_ID')} {self.step}\n")

        def train_step(self, index):
            time.sleep(0.0 if self.first else 1.0)
            return super().train_step(index)

    pretrain.Trainer, pretrain.WITHIN_STEPS = Slow, 2
    checkpoint.WITHIN_SECONDS, checkpoint.WITHIN_SHARE = (-1.0, math.inf) if often else (1e9, 1.0)
    checkpoint.BETWEEN_SECONDS = checkpoint.WITHIN_SECONDS
    for name in ("state", "out"):
        (work / name).mkdir(parents=True, exist_ok=True)
    pretrain.pretrain(run("la", shards=shards), Path(data), work / "state", work / "out", "f")
    if ranks.leads():
        finish(work)
