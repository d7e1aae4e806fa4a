"""Slurm: submission through submitit, state from squeue, then from sacct."""

import getpass
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mirepro.errors import UserError
from mirepro.launch import task
from mirepro.launch.container import Container
from mirepro.launch.ledger import Attempt, Status
from mirepro.launch.scheduler import Request, Unreachable

PATIENCE = 30.0  # seconds before a client command counts as hung
QUEUED = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"})
ACTIVE = frozenset(
    {"RUNNING", "CONFIGURING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
TRANSIENT = re.compile(
    r"unable to contact|timed out|connection refused|connection reset|broken pipe|communication connection failure|"
    r"zero bytes were transmitted|temporarily|try again|slurm_load_jobs error: (socket|transport endpoint)|"
    r"persistent connection|munge|authentication|credential",
    re.IGNORECASE,
)
COLUMNS = "%i|%V|%T|%N|%r|%j"  # the name last: it may hold the separator
CLOCK_SLACK = 120.0  # seconds between the clocks of this machine and the controller's


@dataclass(frozen=True)
class Row:
    """A job as squeue or sacct lists it."""

    job: str
    name: str
    submitted: float
    state: str
    node: str
    detail: str

    def is_of(self, attempt: Attempt, name: str) -> bool:
        """Whether it is this attempt's job and not a later one with a reused id.

        A requeued job keeps its id and name and gets a later submit time, never an earlier one.
        """
        return (self.job, self.name) == (attempt.job, name) and self.submitted > attempt.submitted - CLOCK_SLACK

    def status(self) -> Status:
        """The row as a status."""
        node = self.node if self.node not in ("", "None assigned", "(null)") else ""
        detail = "" if self.detail in ("None", "") else self.detail
        if self.state in QUEUED:
            return Status("queued", self.state, "", detail)
        if self.state in ACTIVE:
            return Status("running", self.state, node)
        return Status("ended", self.state, node, detail)


def command(*words: str) -> str:
    """Output of a client command; see `call`."""
    return call(*words).stdout


def call(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a client command on a standard input.

    Raises:
        Unreachable: It hung, or the controller did not answer it.
        UserError: Any other failure.
    """
    environment = os.environ | {"SLURM_TIME_FORMAT": "%s"}
    options = {"capture_output": True, "text": True, "timeout": PATIENCE, "env": environment}
    try:
        result = subprocess.run(words, input=text, check=False, **options)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"{words[0]} did not answer in {PATIENCE:.0f} s") from error
    except FileNotFoundError as error:
        remedy = "run where Slurm's commands are, or with MIREPRO_LAUNCH=local"
        raise UserError(f"{words[0]}: no such command; {remedy}") from error
    if result.returncode == 0:
        return result
    message = " ".join(result.stderr.split()) or f"exit {result.returncode}"
    raise Unreachable(message) if TRANSIENT.search(message) else UserError(f"{words[0]}: {message}")


class Slurm:
    """One cluster.

    Args:
        poll: Seconds that a listing of the queue stays fresh; all jobs share it.
    """

    def __init__(self, poll: float) -> None:
        self._poll = poll
        self._rows: dict[str, Row] = {}
        self._taken = -float("inf")
        self._accounting = True

    def cluster(self) -> str:
        """ClusterName of slurm.conf."""
        return self._name

    @cached_property
    def _name(self) -> str:
        match = re.search(r"^ClusterName\s*=\s*(\S+)", command("scontrol", "show", "config"), re.MULTILINE)
        if match is None:
            raise UserError("scontrol show config: names no ClusterName; check the Slurm installation")
        return match[1]

    def submit(self, request: Request) -> str:
        """Submits through submitit; see `Scheduler.submit`."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor = _executor(request)
        self._taken = -float("inf")
        try:
            with outside_a_job():
                return str(executor.submit(request.call).job_id)
        except (FailedJobError, FailedSubmissionError) as error:
            message = " ".join(str(error).split())
            if TRANSIENT.search(message):
                raise Unreachable(message) from error
            raise UserError(f"{message}; correct the section in the site file") from error

    def test(self, request: Request) -> str:
        """What sbatch says to the very script of `submit`, which it only looks at.

        Raises:
            UserError: It refuses the script.
        """
        executor = _executor(request)
        script = executor._make_submission_file_text(executor._submitit_command_str, "")
        with outside_a_job():
            return call("sbatch", "--test-only", text=script).stderr

    def find(self, name: str, folder: Path, submitted: float) -> str | None:
        """See `Scheduler.find`."""
        rows = [*self._listing(fresh=True).values(), *self._accounted(submitted, f"--name={name}")]
        return next((row.job for row in rows if row.name == name), None)

    def status(self, attempt: Attempt, name: str) -> Status:
        """See `Scheduler.status`; asks sacct only about a job that has left the queue."""
        if attempt.cluster != self.cluster():
            remedy = f"run there, or give it up with `mirepro jobs cancel {attempt.job}`"
            raise UserError(f"job {attempt.job}: of cluster {attempt.cluster}, this is {self.cluster()}; {remedy}")
        row = self._listing().get(attempt.job)
        rows = [row] if row is not None else self._accounted(attempt.submitted, "--jobs", attempt.job)
        return next((row.status() for row in rows if row.is_of(attempt, name)), Status("absent"))

    def cancel(self, attempt: Attempt, name: str) -> None:
        """See `Scheduler.cancel`."""
        if self.status(attempt, name).alive:
            command("scancel", attempt.job)
            self._taken = -float("inf")

    def _listing(self, fresh: bool = False) -> Mapping[str, Row]:
        if fresh or time.monotonic() - self._taken > self._poll:
            text = command("squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", f"--format={COLUMNS}")
            self._rows = {row.job: row for row in map(_row, text.splitlines()) if row}
            self._taken = time.monotonic()
        return self._rows

    def _accounted(self, submitted: float, *words: str) -> list[Row]:
        """Rows of sacct, none where the cluster keeps no accounts.

        Not of all times: slurmdbd may refuse that (MaxQueryTimeRange), and a job that it does not name counts as lost.
        """
        if not self._accounting:
            return []
        since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(submitted - CLOCK_SLACK))
        form = ("--noheader", "--parsable2", "--allocations", f"--starttime={since}")
        try:
            text = command("sacct", *form, "--format=JobID,Submit,State,NodeList,ExitCode,JobName", *words)
        except UserError as error:
            self._accounting = re.search("is disabled|no such command", str(error)) is None
            return []
        return [row for row in map(_row, text.splitlines()) if row]


def _row(line: str) -> Row | None:
    job, submitted, state, node, detail, name = [part.strip() for part in line.split("|", 5)]
    return Row(job, name, float(submitted), state, node, detail) if submitted.isdigit() else None


def _executor(request: Request) -> Any:
    """submitit's executor with the parameters of a request."""
    import submitit

    container = Container(request.root, request.section) if request.section.image else None
    python = container.python() if container else None
    executor = submitit.SlurmExecutor(request.folder, max_num_timeout=request.requeues, python=python)
    executor.update_parameters(**parameters(request, container))
    return executor


def parameters(request: Request, container: Container | None = None) -> dict[str, Any]:
    """submitit's parameters for a request; what the section leaves out is left to the cluster."""
    section = request.section
    values = {
        "job_name": request.name, "time": section.minutes, "nodes": section.nodes, "ntasks_per_node": section.tasks,
        "cpus_per_task": section.cpus or request.threads, "gpus_per_node": section.gpus or None,
        "mem": section.memory, "partition": section.partition, "account": section.account, "qos": section.qos,
        "signal_delay_s": section.grace, "stderr_to_stdout": True, "setup": list(section.setup) or None,
        # srun does not take over sbatch's --cpus-per-task since Slurm 22.05, and would bind a task to one core.
        "srun_args": [*(container.srun if container else ()), f"--cpus-per-task={section.cpus or request.threads}",
                      "--kill-on-bad-exit=1"],
        "teardown": task.requeue_lines(request.folder) if container else None,
        "additional_parameters": {"requeue": True} | {str(key): value for key, value in section.options.items()},
    }  # fmt: skip
    return {key: value for key, value in values.items() if value is not None}


@contextmanager
def outside_a_job() -> Iterator[None]:
    """Hides the variables of a Slurm job that this command runs in; its children would inherit its limits."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    inside = "SLURM_JOB_ID" in os.environ
    hidden = {k: v for k, v in os.environ.items() if inside and k.startswith("SLURM_") and k not in kept}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
