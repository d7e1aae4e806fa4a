"""What a job that failed says: the traceback of the rank that failed first, in every place that people read."""

import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from mirepro.errors import UserError
from mirepro.launch import commands, remote, waves
from mirepro.launch.launcher import FASTEST, TAIL, Handle, JobFailed, Launcher, Ticket
from mirepro.launch.ledger import Attempt, Status
from mirepro.launch.plan import Plan
from mirepro.launch.remote import Remote
from mirepro.launch.scheduler import Request
from mirepro.site import Section, Site

TRACE = 'Traceback (most recent call last):\n  File "a.py", line 7, in step\n    1 / 0\nZeroDivisionError: the cause\n'
LOST = ("success", "rank 0: lost the other ranks (closed); the first error says why; the same command resumes")


class Ended:
    """A scheduler whose only job has ended."""

    def cluster(self) -> str:
        return "here"

    def submit(self, request: Request) -> str:
        return "7"

    def status(self, attempt: Attempt, name: str) -> Status:
        return Status("ended", "FAILED", detail="NonZeroExitCode")

    def cancel(self, attempt: Attempt, name: str) -> None:
        """It has ended."""


class Again(Ended):
    """One whose jobs all end so, or with a result.

    Args:
        work: Where a result stands.
        good: The job that brings it.
    """

    def __init__(self, work: Path, good: int) -> None:
        self.work, self.good, self.job = work, good, 6

    def submit(self, request: Request) -> str:
        self.job += 1
        if self.job == self.good:
            (self.work / "finished").mkdir(parents=True)
        return str(self.job)

    def cancel(self, attempt: Attempt, name: str) -> None:
        pass


def launcher(root: Path, good: int, retries: int = 1) -> tuple[Launcher, Ticket]:
    """A launcher of such a scheduler, and a computation."""
    site = Site("here", settle=0.0, retries=retries, sections={"pretrain": Section()})
    ticket = Ticket("pretrain@a", "pretrain", "f", root / "work", print, 1)
    return Launcher(root, site, Again(ticket.work, good)), ticket


def failed(root: Path, *results: Any) -> Handle:
    """A job whose ranks left these results, the last one first; each has a log."""
    site = Site("here", settle=0.0, retries=0, sections={"pretrain": Section(tasks=len(results))})
    handle = Launcher(root, site, Ended()).start(Ticket("pretrain@a", "pretrain", "f", root / "work", print, 1))  # type: ignore[arg-type]
    assert not handle.poll(), "it is submitted first"
    for rank, result in enumerate(results):
        handle.log.with_name(f"7_{rank}_log.out").write_text(f"rank {rank} starts\n" + "step\n" * 50)
        if result is not None:
            path = handle.log.with_name(f"7_{rank}_result.pkl")
            path.write_bytes(pickle.dumps(result))
            os.utime(path, (1000 - rank, 1000 - rank))
    return handle


def said(handle: Handle) -> list[str]:
    """The message's lines; the stage's log and the summary have the same."""
    with pytest.raises(JobFailed) as caught:
        handle.poll()
    lines = str(caught.value).splitlines()
    log = handle.log.with_name("stage.log")
    worker = Remote(handle, log, 1.0)
    assert worker.exitcode == 1
    assert log.read_text() == f"mirepro: {caught.value}\n"
    summary = waves._complaint(waves.Running("pretrain@a", worker, log, log)).splitlines()
    assert summary[1:] == [f"mirepro: {lines[0]}", *lines[1:]]
    return lines


def test_the_first_failed_rank_speaks_and_its_log_is_named(tmp_path: Path) -> None:
    first, *rest = said(handle := failed(tmp_path, LOST, ("error", "ValueError: late"), ("error", TRACE)))
    assert "job 7: ZeroDivisionError: the cause " in first
    assert first.endswith(f"; log of rank 2: {handle.log}")
    assert handle.log.name == "7_2_log.out"
    assert rest == TRACE.splitlines()


def test_a_job_of_one_rank_says_it_once(tmp_path: Path) -> None:
    """Neither the rank nor the log's other lines; control: a job that left no word of its own."""
    first, *rest = said(handle := failed(tmp_path, ("error", TRACE)))
    assert first.endswith(f"; log: {handle.log}")
    assert rest == TRACE.splitlines()
    first, *rest = said(failed(tmp_path / "control", None))
    assert "FAILED NonZeroExitCode, without a result" in first
    assert rest == ["step"] * TAIL


def test_a_long_traceback_is_cut_so_that_the_summary_has_the_reason(tmp_path: Path) -> None:
    lines = said(failed(tmp_path, ("error", "\n".join(["deeper"] * 100 + ["ValueError: deep"]))))
    assert len(lines) == 1 + TAIL
    assert lines[-1] == "ValueError: deep"


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    (line,) = said(failed(tmp_path, LOST, ("success", "rows.x: impossible; use y")))
    assert "job 7: rows.x: impossible; use y; log of rank 1: " in line


def printed(handle: Handle, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What `mirepro jobs logs` prints."""
    (entry,) = handle._launcher.ledger.entries(pytest.fail)
    known = commands.Known(entry, entry.attempts[-1], handle._launcher)
    monkeypatch.setattr(commands, "select", lambda *_: [known])
    return CliRunner().invoke(commands.jobs_app, ["logs", *words, "7"]).stdout


@pytest.mark.parametrize("results", [(LOST, ("error", TRACE)), (("error", TRACE), LOST), (("error", TRACE),), (None,)])
def test_the_log_to_read_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: tuple[Any, ...]) -> None:
    """Control: where that is rank 0's, or no rank is known to have failed, it is alone and has no heading."""
    handle = failed(tmp_path, *results)
    lines = [line for line in printed(handle, monkeypatch).splitlines() if line != "step"]
    names = [f"==> {handle.log.with_name(f'7_{rank}_log.out')} <==" for rank in (1, 0)]
    later = results[0] == LOST
    assert lines == ([names[0], "rank 1 starts", names[1], "rank 0 starts"] if later else ["rank 0 starts"])


def test_a_rank_that_fails_while_the_log_is_followed_is_shown_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = failed(tmp_path, LOST, None)

    def fail(*_: object) -> Status:
        handle.log.with_name("7_1_result.pkl").write_bytes(pickle.dumps(("error", TRACE)))
        return Status("ended")

    monkeypatch.setattr(Ended, "status", fail)
    shown = printed(handle, monkeypatch, "-f")
    assert shown.startswith("rank 0 starts\nstep\n")
    assert f"step\n==> {handle.log} <==\nrank 1 starts\nstep\n" in shown


def test_a_refused_submission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the end of an earlier attempt's log, too."""

    def refuse(*_: object) -> bool:
        raise UserError("sbatch: no")

    handle = failed(tmp_path, None)
    monkeypatch.setattr(handle, "poll", refuse)
    assert Remote(handle, tmp_path / "stage.log", 1.0).exitcode == 1
    assert (tmp_path / "stage.log").read_text() == "mirepro: sbatch: no\n"


@pytest.mark.parametrize("refused", [True, False])
def test_a_stage_that_cannot_be_launched_has_failed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """It looks like one whose job failed, so that --keep-going goes on; control: the same stage is launched."""
    jobs, ticket = launcher(tmp_path, 7)

    def describe(*_: object) -> object:
        if refused:
            raise UserError("x.json: damaged")
        return ticket

    monkeypatch.setattr(remote.jobs, "ticket", describe)
    log = tmp_path / "stage.log"
    started = remote.Dispatch(SimpleNamespace(), jobs).start("pretrain@a", log, log)  # type: ignore[arg-type]
    if not refused:
        assert isinstance(started, Remote)
        return
    item = waves.Running("pretrain@a", started, log, log)
    assert (item.poll(), item.alive(), item.computed, item.sentinel) == (1, False, False, None)
    assert log.read_text() == "mirepro: x.json: damaged\n"


@pytest.mark.parametrize("detail", ["launch failed requeued held", "JobHeldAdmin", "Resources", "Priority"])
def test_a_job_that_nobody_lets_start_is_remarked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detail: str
) -> None:
    """Once, however often one looks; control: one that has to wait for its turn."""
    monkeypatch.setattr(Ended, "status", lambda *_: Status("queued", "PENDING", detail=detail))
    jobs, ticket = launcher(tmp_path, 99)
    handle = jobs.start(ticket)
    for _ in range(3):
        handle.poll()
    said = [f"pretrain@a: job 7 does not start by itself ({detail}); cure the cause, then `scontrol release 7` or "]
    assert [note.partition("`mirepro")[0] for note in handle.notes] == (said if "eld" in detail else [])


def test_a_result_is_seen_before_the_next_look_at_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However rarely the queue is asked; control: without a result the job goes on, and nobody asks."""
    asked: list[str] = []

    def running(self: Ended, attempt: Attempt, name: str) -> Status:
        asked.append(name)
        return Status("running", "RUNNING")

    monkeypatch.setattr(Ended, "status", running)
    handle = failed(tmp_path, None)
    worker = Remote(handle, tmp_path / "stage.log", 60.0)
    worker._pause = 60.0
    assert worker.exitcode is None
    time.sleep(2 * FASTEST)
    assert (worker.exitcode, len(asked)) == (None, 1)
    handle.ticket.work.mkdir()
    (handle.ticket.work / "finished").touch()
    time.sleep(2 * FASTEST)
    assert (worker.exitcode, len(asked)) == (0, 1)


NOTE = "pretrain@a: job 7: FAILED NonZeroExitCode, without a result; submitted again"


@pytest.mark.parametrize("good", [7, 8])
def test_a_command_says_why_a_job_is_submitted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], good: int
) -> None:
    """As `MIREPRO_LAUNCH=slurm dvc repro` shows it; control: a job that brings its result has nothing to explain."""
    jobs, ticket = launcher(tmp_path, good)
    jobs.run(ticket)
    assert capsys.readouterr().err.splitlines() == ["pretrain@a is job 7", NOTE, "pretrain@a is job 8"][: 2 * good - 13]


class Starter:
    """Starts a launched computation as the only stage; DVC's part is left out."""

    def __init__(self, root: Path, good: int) -> None:
        jobs, ticket = launcher(root, good)
        self.log = root / "log"
        self.remote = Remote(jobs.start(ticket), self.log, 0.0)

    def start(self, name: str) -> waves.Running:
        return waves.Running(name, self.remote, self.log, self.log)

    def collect(self, items: list[waves.Running]) -> None:
        for item in items:
            item.process = SimpleNamespace(pid=0, poll=lambda: 0)

    def recorded(self, names: object) -> None:
        pass


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("good", [7, 8])
def test_a_reproduction_says_so_above_its_board(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], good: int, terminal: bool
) -> None:
    """On a terminal too; the stage's log keeps it."""
    for name, value in (("TTY_COMPATIBLE", "1"), ("TERM", "xterm"), ("COLUMNS", "120")) if terminal else ():
        monkeypatch.setenv(name, value)
    board = waves.Board({"pretrain@a": 1.0}, 1)
    waves.Wave(Starter(tmp_path, good), Plan({"pretrain@a": set()}, ["pretrain@a"], {}), 1, board).run()  # type: ignore[arg-type]
    shown = [line for line in capsys.readouterr().err.splitlines() if NOTE in line]
    assert len(shown) == (good == 8)
    assert f"mirepro: {NOTE}\n" in (tmp_path / "log").read_text() if good == 8 else not (tmp_path / "log").exists()
