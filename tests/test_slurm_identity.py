"""Slurm without a cluster: whose job a row of squeue or sacct is, and what stands in the batch script."""

import dataclasses
import os
import re
from pathlib import Path

import pytest

from mirepro.errors import UserError
from mirepro.launch import slurm
from mirepro.launch.ledger import Attempt
from mirepro.launch.scheduler import Request
from mirepro.launch.slurm import CLOCK_SLACK, Row, Slurm
from mirepro.site import Section

NAME = "pretrain@a.0123abcd"
ATTEMPT = Attempt("0123abcd", "f", "submitted", "alps", "7", 1_000_000.0)
ROW = Row("7", NAME, 1_000_001.0, "RUNNING", "n1", "None")


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, True),
        ({"submitted": ATTEMPT.submitted + 86400}, True),  # requeued
        ({"submitted": ATTEMPT.submitted - CLOCK_SLACK + 1}, True),  # the controller's clock is late
        ({"submitted": ATTEMPT.submitted - CLOCK_SLACK - 1}, False),
        ({"name": "pretrain@a.76543210"}, False),
        ({"name": "pretrain@a"}, False),
        ({"job": "8"}, False),
        ({"job": "7_1"}, False),
    ],
)
def test_a_row_is_known_by_id_name_and_submit_time(changes: dict[str, object], own: bool) -> None:
    assert dataclasses.replace(ROW, **changes).is_of(ATTEMPT, NAME) == own  # type: ignore[arg-type]


class Clients:
    """Stand-ins of Slurm's commands that print what a test wants, and note what is cancelled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cancelled = folder, folder / "cancelled"
        self.says("scontrol", "ClusterName = alps")
        self.says("squeue")
        self.says("sacct")
        self.says("srun")
        self._write("scancel", f"echo $1 >> {self.cancelled}")

    def says(self, command: str, *lines: str) -> None:
        self._write(command, f"cat <<'EOF'\n{chr(10).join(lines)}\nEOF" if lines else "")

    def _write(self, command: str, body: str) -> None:
        (self.folder / command).write_text(f"#!/bin/sh\n{body}\n")
        (self.folder / command).chmod(0o755)


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clients:
    """The stand-ins, before all other commands."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    return Clients(tmp_path / "bin")


OWN = f"7|1000001|RUNNING|n1|None|{NAME}"
STRANGER = "7|1000001|RUNNING|n1|None|pretrain@a.76543210"
EARLIER = f"7|900000|RUNNING|n1|None|{NAME}"


@pytest.mark.parametrize(("line", "phase"), [(OWN, "running"), (STRANGER, "absent"), (EARLIER, "absent")])
def test_a_reused_id_is_neither_ours_nor_cancelled(clients: Clients, line: str, phase: str) -> None:
    """Control: our own row."""
    clients.says("squeue", line)
    cluster = Slurm(0.0)
    assert cluster.status(ATTEMPT, NAME).phase == phase
    cluster.cancel(ATTEMPT, NAME)
    assert clients.cancelled.exists() == (line == OWN)


@pytest.mark.parametrize(
    ("lines", "state"),
    [
        ([STRANGER.replace("RUNNING", "FAILED"), OWN.replace("RUNNING", "COMPLETED")], "COMPLETED"),
        ([STRANGER.replace("RUNNING", "FAILED")], ""),
    ],
)
def test_accounts_keep_both_jobs_of_a_reused_id(clients: Clients, lines: list[str], state: str) -> None:
    clients.says("sacct", *lines)
    assert Slurm(0.0).status(ATTEMPT, NAME).state == state


def test_a_stranger_whose_name_holds_the_separator_is_no_trouble(clients: Clients) -> None:
    clients.says("squeue", "9|1000001|RUNNING|n1|None|a|b|c", OWN)
    assert Slurm(0.0).status(ATTEMPT, NAME).phase == "running"
    assert Slurm(0.0).status(dataclasses.replace(ATTEMPT, job="9"), "a|b|c").phase == "running"  # control: read whole


@pytest.mark.parametrize(("words", "asked"), [("Slurm accounting storage is disabled", 1), ("no permission", 2)])
def test_accounts_are_given_up_only_where_there_are_none(clients: Clients, words: str, asked: int) -> None:
    calls = clients.folder / "calls"
    clients._write("sacct", f"echo >> {calls}\necho '{words}' >&2\nexit 1")
    cluster = Slurm(0.0)
    assert [cluster.status(ATTEMPT, NAME).phase for _ in range(2)] == ["absent", "absent"]
    assert len(calls.read_text()) == asked


def test_a_job_of_another_cluster_is_not_asked_about_here(clients: Clients) -> None:
    """Control: the same attempt on its own cluster."""
    clients.says("squeue", OWN)
    assert Slurm(0.0).status(ATTEMPT, NAME).alive
    clients.says("scontrol", "ClusterName = jura")
    for ask in (Slurm(0.0).status, Slurm(0.0).cancel):
        with pytest.raises(UserError, match=r"job 7: of cluster alps, this is jura; .* `mirepro jobs cancel 7`"):
            ask(ATTEMPT, NAME)
    assert not clients.cancelled.exists()


@pytest.mark.parametrize("setup", [(), ("module load cuda", "export A='b c'")])
def test_lines_of_setup_come_before_the_command_in_the_script(
    clients: Clients, tmp_path: Path, setup: tuple[str, ...]
) -> None:
    """Control: a section without them."""
    executor = slurm._executor(Request("a", tmp_path, tmp_path, print, Section(setup=setup), 0))
    lines = executor._make_submission_file_text(executor._submitit_command_str, "").splitlines()
    command = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    first = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    between = [line for line in lines[first + 1 : command] if line and not re.match("#|export SUBMITIT_", line)]
    assert between == list(setup)
