"""The commands about jobs where something is missing: the scheduler's answer, or the site's file."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_ledger import Fake, Job, Killed, make
from typer.testing import CliRunner

from mirepro.errors import UserError
from mirepro.launch import commands
from mirepro.launch.launcher import Launcher
from mirepro.launch.ledger import Attempt, Ledger, Status
from mirepro.launch.scheduler import Local

Jobs = Callable[..., str]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """What `mirepro jobs` prints in the test's folder."""
    monkeypatch.setattr(commands.profiles, "find_root", lambda: tmp_path)
    return lambda *words: CliRunner().invoke(commands.jobs_app, words, catch_exceptions=False).stdout


def cut_short(root: Path, monkeypatch: pytest.MonkeyPatch, crash: str) -> Fake:
    """A scheduler whose head was killed in the middle of a submission."""
    fake = Fake()
    launcher, ticket = make(root, fake)
    monkeypatch.setattr(commands, "_launcher", lambda *_: launcher)
    fake.crash = crash
    with pytest.raises(Killed):
        launcher.start(ticket).poll()
    return fake


def test_cancel_finds_the_job_of_a_submission_that_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs
) -> None:
    fake = cut_short(tmp_path, monkeypatch, "after")
    assert "SUBMITTING" in jobs("list")
    assert jobs("prune", "--days", "0") == "0 entries removed\n"
    fake.answers = False
    assert "pretrain@a: not cancelled, " in jobs("cancel", "pretrain@a")
    assert len(fake.alive()) == 1
    fake.answers = True
    assert jobs("cancel", "pretrain@a") == "1 pretrain@a: cancelled\n"
    assert not fake.alive()
    assert "cancelled by `mirepro jobs cancel`" in jobs("list")


@pytest.mark.parametrize("settle", [60.0, 0.0])
def test_a_submission_may_come_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settle: float) -> None:
    """An sbatch that outlives its head and waits for the controller; control: whoever does not wait has two jobs."""
    fake = cut_short(tmp_path, monkeypatch, "before")
    launcher, ticket = make(tmp_path, fake, settle)
    handle = launcher.start(ticket)
    (late,) = Ledger(tmp_path).read("f").attempts  # type: ignore[union-attr]
    handle.poll()
    fake.jobs["99"] = Job(f"pretrain@a.{late.token}", tmp_path / late.folder, Status("queued", "PENDING"))
    handle.poll()
    assert len(fake.alive()) == (1 if settle else 2)
    assert (handle.job == "99") == bool(settle)


def test_a_submission_that_never_came_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = cut_short(tmp_path, monkeypatch, "before")
    launcher, ticket = make(tmp_path, fake, 0.3)
    handle = launcher.start(ticket)
    handle.poll()
    assert not fake.jobs
    time.sleep(0.3)
    handle.poll()
    assert len(fake.alive()) == 1


def test_cancel_waits_for_a_submission_that_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs
) -> None:
    fake = cut_short(tmp_path, monkeypatch, "before")
    launcher, _ = make(tmp_path, fake, 60.0)
    monkeypatch.setattr(commands, "_launcher", lambda *_: launcher)
    (late,) = Ledger(tmp_path).read("f").attempts  # type: ignore[union-attr]

    def arrive(_: float) -> None:
        fake.jobs["1"] = Job(f"pretrain@a.{late.token}", tmp_path / late.folder, Status("queued", "PENDING"))

    monkeypatch.setattr(time, "sleep", arrive)
    assert jobs("cancel", "pretrain@a") == "1 pretrain@a: cancelled\n"
    assert not fake.alive()


@pytest.mark.parametrize("again", [True, False])
def test_prune_leaves_what_is_submitted_again_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs, again: bool
) -> None:
    """Between the look at an old job and its removal; control: without that it is removed."""
    here = Local().cluster()
    write(tmp_path, "old", "local", Attempt("t", "old", "failed", here, f"{2**22}.1", 1.0))
    seen = commands.known(tmp_path)
    if again:
        write(tmp_path, "old", "local", Attempt("u", "old", "submitted", here, f"{2**22}.2", 2.0))
    monkeypatch.setattr(commands, "known", lambda _: seen)
    assert jobs("prune") == f"{0 if again else 1} entries removed\n"
    assert (Ledger(tmp_path).read("old") is not None) == again


def test_cancel_of_a_submission_that_came_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs
) -> None:
    fake = cut_short(tmp_path, monkeypatch, "before")
    assert jobs("cancel", "pretrain@a") == "pretrain@a: was over\n"
    assert not fake.jobs


def test_control_a_cancel_that_does_not_look_leaves_an_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs
) -> None:
    fake = cut_short(tmp_path, monkeypatch, "after")
    monkeypatch.setattr(Launcher, "adopt", lambda *_, **__: None)
    assert "cancelled" in jobs("cancel", "pretrain@a")
    assert len(fake.alive()) == 1


def write(root: Path, stage: str, site: str, attempt: Attempt) -> None:
    """An entry of the ledger; its fingerprint is the stage's name."""
    ledger = Ledger(root)
    with ledger.locked(stage, stage, site) as entry:
        entry.attempts.append(attempt)
        ledger.save(entry)


def test_a_site_without_a_right_file_hides_no_other_jobs(tmp_path: Path, jobs: Jobs) -> None:
    """Control: of a site with one the scheduler knows the job's end."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "bad.toml").write_text("pol = 3\n")
    here = Local().cluster()
    for stage, site in (("renamed", "moon"), ("broken", "bad"), ("right", "local")):
        write(tmp_path, stage, site, Attempt("t", stage, "submitted", here, f"{2**22}.1", 1.0))
    write(tmp_path, "begun", "local", Attempt("t", "begun", "submitting", here, "", 1.0))
    stages = ("renamed", "broken", "right", "begun")
    lines = {stage: next(line for line in jobs("list").splitlines() if f" {stage} " in line) for stage in stages}
    assert "UNREACHABLE" in lines["renamed"]
    assert lines["renamed"].endswith("known: inline, slurm, local, bad")
    assert "UNREACHABLE" in lines["broken"]
    assert "pol: unknown key; did you mean 'poll'?" in lines["broken"]
    assert "ABSENT" in lines["right"]
    assert "SUBMITTING" in lines["begun"]
    assert jobs("prune", "--days", "0") == "1 entries removed\n"
    assert {entry.stage for entry in Ledger(tmp_path).entries(pytest.fail)} == {"renamed", "broken", "begun"}
    assert "renamed: given up, not stopped (MIREPRO_LAUNCH: 'moon': no file" in jobs("cancel", "renamed")
    assert jobs("prune", "--days", "0") == "1 entries removed\n"


def test_a_damaged_entry_is_named_and_the_others_are_shown(tmp_path: Path, jobs: Jobs) -> None:
    write(tmp_path, "right", "local", Attempt("t", "right", "submitted", Local().cluster(), f"{2**22}.1", 1.0))
    (tmp_path / ".mirepro/jobs/x.json").write_text("{")
    result = CliRunner().invoke(commands.jobs_app, ["list"], catch_exceptions=False)
    assert result.exit_code == 0
    assert " right " in result.stdout
    assert f"{tmp_path}/.mirepro/jobs/x.json" in result.stderr


def test_a_submission_to_another_cluster_is_not_made_again_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: Jobs
) -> None:
    fake = cut_short(tmp_path, monkeypatch, "after")
    launcher, ticket = make(tmp_path, fake)
    monkeypatch.setattr(Fake, "cluster", lambda self: "other")
    with pytest.raises(UserError, match=r"its submission to fake was cut short, and this is other; run there, or del"):
        launcher.start(ticket).poll()
    assert "not cancelled" in jobs("cancel", "pretrain@a")
    assert len(fake.jobs) == 1
    monkeypatch.undo()  # control: the job is found where it is
    launcher, ticket = make(tmp_path, fake)
    launcher.start(ticket).poll()
    assert len(fake.jobs) == 1
