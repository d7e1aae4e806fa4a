"""What a job runs: a stage's computation that knows how to go on after a signal. Imports no scheduler."""

import hashlib
import os
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from mirepro import codelocks, determinism, execution, profiles, stages
from mirepro.errors import UserError
from mirepro.launch.container import die_with_client, unblock
from mirepro.notice import NOTICE

MARK = "requeue"  # file in a job's folder
PATIENCE = 0.5  # share of the grace that a checkpoint may take to come; the rest is for the requeue
BARREN = 3
"""Runs up to the time limit that may leave no newer checkpoint before the job gives up."""


def stamp(work: Path) -> str:
    """Changes with every new checkpoint in a work folder."""
    # Not Path.rglob, which fails where a folder goes away while it looks.
    found = (Path(folder, name) for folder, _, names in os.walk(work / "state") for name in names)
    seen = [(str(path), stat.st_mtime_ns, stat.st_size) for path in sorted(found) if (stat := _stat(path))]
    return hashlib.sha256(repr(seen).encode()).hexdigest()


def _stat(path: Path) -> os.stat_result | None:
    """None for a file that was renamed meanwhile."""
    try:
        return path.stat()
    except OSError:
        return None


class Task:
    """Computes a stage inside a job; submitit calls it, and `checkpoint` before it requeues the job.

    The computation keeps its own checkpoints, so that a job killed without any signal resumes too. A signal is passed
    on as a notice, on which a training writes another one; `checkpoint` only sees to it that a job whose time limit is
    too short for one checkpoint ends with a message.

    Args:
        call: Computes the stage, or resumes it.
        work: The stage's work folder.
        seconds: Time limit of one run.
        grace: Seconds between the signal and the limit.
    """

    def __init__(self, call: Callable[[], None], work: Path, seconds: float, grace: float) -> None:
        self.call, self.work, self.seconds, self.grace = call, work, seconds, grace
        self.barren = 0
        self._started, self._found = 0.0, ""

    def __call__(self) -> str | None:
        """Returns None, or in one line what was refused; other errors are submitit's to report."""
        # The computation makes the work folder: a late rank must not, its result may have been collected already.
        self._started, self._found = time.monotonic(), stamp(self.work)
        from mirepro import progress  # every command imports this module, and few a bar

        os.environ[progress.REPORT] = str(self.work / "progress")
        _substitute_scontrol()
        die_with_client()
        unblock()
        _heed(PATIENCE * self.grace)
        try:
            self.call()
        except UserError as error:
            return str(error)
        return None

    def checkpoint(self) -> object:
        """The submission that goes on; raises where going on is pointless."""
        from submitit.helpers import DelayedSubmission

        timed_out = time.monotonic() - self._started > 0.5 * self.seconds
        progressed = stamp(self.work) != self._found
        self.barren = 0 if progressed else self.barren + timed_out
        if self.barren >= BARREN:
            raise RuntimeError(f"{self.barren} runs reached the time limit without a new checkpoint; raise `time`")
        return DelayedSubmission(self)


def compute(root: Path, profile_name: str, kind: str, key: str | None, mark: str) -> None:
    """Body of a job: computes a stage, or resumes it, and leaves the result in its work folder.

    Raises:
        UserError: What the result depends on has changed since the job was submitted, or the stage refuses.
    """
    profile = profiles.load(root, profile_name)
    determinism.reexec_if_needed(profile.tier, profile.threads)
    name, job = stages.described(profile, kind, key)
    if execution.fingerprint(root, name, job) != mark or not codelocks.current(root, job.needs):
        raise UserError(f"{name}: parameters, data or code changed after the job was submitted; rerun the command")
    execution.execute(root, name, job, collect=False)


def _heed(patience: float) -> None:
    """Lets submitit's handler, which requeues and exits, wait for a checkpoint; Slurm's SIGTERM asks for one, too."""
    from submitit.core.job_environment import JobEnvironment

    usual = JobEnvironment._usr_sig()
    requeue = signal.getsignal(usual)
    if not callable(requeue):
        return  # no job of submitit's

    def told(number: int, frame: FrameType | None) -> None:
        NOTICE.give(partial(requeue, number, frame), patience)

    signal.signal(usual, told)
    signal.signal(signal.SIGTERM, lambda number, frame: NOTICE.give())


def requeue_lines(folder: Path) -> list[str]:
    """Shell lines after a containerised job: requeue it where `_substitute_scontrol` asked for that; else its code."""
    mark = shlex.quote(str(folder / MARK))
    return ["code=$?", f"if [ -e {mark} ]; then rm {mark}; scontrol requeue $SLURM_JOB_ID; fi", "exit $code"]


def _substitute_scontrol() -> None:
    """Inside an image without Slurm's commands: a `scontrol` that leaves a mark for the batch script outside."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm" or shutil.which("scontrol"):
        return
    folder = Path(os.environ["SUBMITIT_FOLDER"])
    substitute = Path(tempfile.mkdtemp()) / "scontrol"
    substitute.write_text(f"#!/bin/sh\n: > {shlex.quote(str(folder / MARK))}\n")
    substitute.chmod(0o755)
    os.environ["PATH"] = f"{substitute.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
