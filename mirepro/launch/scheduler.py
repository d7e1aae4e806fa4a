"""What a launcher needs of a scheduler, and this machine as one: jobs that outlive the command that started them."""

import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mirepro.errors import UserError
from mirepro.launch.ledger import Attempt, Status
from mirepro.site import Section

FOREVER = 60 * 24 * 365  # minutes


class Unreachable(Exception):
    """The scheduler does not answer now; whether it took the job is not known."""


@dataclass(frozen=True)
class Request:
    """A job to submit.

    Attributes:
        name: Its name: the stage and the attempt's token.
        root: The repository's root.
        folder: For its log and pickles.
        call: What it runs; pickled.
        section: What it asks for.
        requeues: How often it may be requeued at its time limit.
        threads: Cores of a task, where the section names none.
    """

    name: str
    root: Path
    folder: Path
    call: Callable[[], Any]
    section: Section
    requeues: int
    threads: int = 1


class Scheduler(Protocol):
    """Submits, finds and cancels jobs; every call may raise `Unreachable`."""

    def cluster(self) -> str:
        """Name of the cluster; ids of another one mean nothing here."""

    def submit(self, request: Request) -> str:
        """Submits a job and returns its id; UserError where the request itself is refused."""

    def find(self, name: str, folder: Path, submitted: float) -> str | None:
        """The id of a job that was submitted under this name at about this time, though nobody wrote its id down."""

    def status(self, attempt: Attempt, name: str) -> Status:
        """What is known about a job; another job with the same id is `absent`."""

    def cancel(self, attempt: Attempt, name: str) -> None:
        """Ends a job."""


class Local:
    """Jobs on this machine, each in a session of its own (submitit's local executor)."""

    def cluster(self) -> str:
        """Host and boot, so that a process number is not mistaken for one before a restart."""
        boot = Path("/proc/sys/kernel/random/boot_id")
        return f"{platform.node()}:{boot.read_text().strip()[:8] if boot.exists() else ''}"

    def submit(self, request: Request) -> str:
        """Starts the job from a short-lived process: a session of its own survives Ctrl-C and log-out."""
        from cloudpickle import dumps

        command = [sys.executable, "-m", "mirepro.launch.scheduler"]
        options = {"input": dumps(request), "capture_output": True, "start_new_session": True}
        result = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
        if result.returncode:
            raise UserError(f"local job: {result.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
        return _identity(int(result.stdout))

    def find(self, name: str, folder: Path, submitted: float) -> str | None:
        """The controller whose command line names the job's folder; the shell of its `setup`, where it has one."""
        parents: dict[int, int] = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                line = path.read_bytes()
                if b"submitit.local._local" in line and os.fsencode(folder) in line:
                    stat = path.with_name("stat").read_text().rpartition(")")[2].split()
                    parents[int(path.parent.name)] = int(stat[1])
        first = next((pid for pid, parent in parents.items() if parent not in parents), None)
        return None if first is None else _identity(first)

    def status(self, attempt: Attempt, name: str) -> Status:
        """Whether the very process lives."""
        if attempt.cluster != self.cluster():
            host = attempt.cluster.partition(":")[0]
            other = host != platform.node()
            return Status("unreachable", detail=f"started on {host}, look there") if other else Status("absent")
        pid = int(attempt.job.partition(".")[0])
        alive = _identity(pid) == attempt.job and not attempt.job.endswith(".0")
        return Status("running", "RUNNING", platform.node()) if alive else Status("absent")

    def cancel(self, attempt: Attempt, name: str) -> None:
        """Interrupts the job's session, then kills what is left of it.

        Raises:
            UserError: It runs on another host.
        """
        if (seen := self.status(attempt, name)).phase == "unreachable":
            raise UserError(f"job {attempt.job}: {seen.detail}")
        pid = int(attempt.job.partition(".")[0])
        for sign, seconds in ((signal.SIGINT, 3.0), (signal.SIGKILL, 1.0)):
            with suppress(ProcessLookupError):
                if self.status(attempt, name).alive:
                    os.killpg(os.getpgid(pid), sign)
            end = time.monotonic() + seconds
            while self.status(attempt, name).alive and time.monotonic() < end:
                time.sleep(0.05)


class Lost:
    """Stands for the scheduler of a site whose file cannot be read: every question gets the reason.

    Args:
        reason: What is wrong with the file.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def cluster(self) -> str:
        """See `Scheduler`, as for all others."""
        raise Unreachable(self._reason)

    def submit(self, request: Request) -> str:
        """Not possible."""
        raise Unreachable(self._reason)

    def find(self, name: str, folder: Path, submitted: float) -> str | None:
        """Not known."""
        raise Unreachable(self._reason)

    def status(self, attempt: Attempt, name: str) -> Status:
        """Not known."""
        raise Unreachable(self._reason)

    def cancel(self, attempt: Attempt, name: str) -> None:
        """Not possible."""
        raise Unreachable(self._reason)


def _identity(pid: int) -> str:
    """Process number and start time; "PID.0" for a process that is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return f"{pid}.0"
    return f"{pid}.{0 if fields[0] == 'Z' else fields[19]}"


def pickled(folder: Path, job: str) -> None:
    """Gives the job its pickle, where the submitting process was killed before it could."""
    for path in folder.glob("*.pkl"):
        if len(path.stem) == 32:  # submitit's name before it knows the id
            with suppress(FileNotFoundError):  # the submitting process, which outlives its head, was faster
                os.replace(path, folder / f"{job.partition('.')[0]}_submitted.pkl")


def main() -> None:
    """Submits the request on standard input and prints the controller's process number."""
    import submitit

    signal.pthread_sigmask(signal.SIG_SETMASK, set())  # the launcher blocks Ctrl-C while it submits
    out, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)  # the controller inherits it; the launcher waits for the end of the real one
    request: Request = pickle.load(sys.stdin.buffer)
    executor = submitit.LocalExecutor(request.folder, max_num_timeout=request.requeues)
    section = request.section
    executor.update_parameters(
        timeout_min=section.minutes, tasks_per_node=section.tasks, gpus_per_node=section.gpus,
        signal_delay_s=section.grace, stderr_to_stdout=True, setup=list(section.setup),
    )  # fmt: skip
    os.dup2(null, 2)
    os.write(out, str(executor.submit(request.call).job_id).encode())
    os._exit(0)  # the controller goes on


if __name__ == "__main__":
    main()
