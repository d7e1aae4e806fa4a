"""Launches on a real Slurm of two nodes: ends of every kind, requeues, killed heads and daemons."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import slurm_jobs
import yaml
from cluster import Cluster, until
from miniature import Miniature
from slurm_bench import HERE, Bench, cluster, living, own, tidy
from typer.testing import CliRunner

from mirepro import checkpoint
from mirepro.errors import UserError
from mirepro.launch import commands, slurm, waves
from mirepro.launch.launcher import JobFailed
from mirepro.launch.remote import Remote
from tests.test_pretrain import bytes_of, data, run, train

__all__ = ["cluster", "data", "own", "tidy"]

pytestmark = [pytest.mark.slow, pytest.mark.infra]


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `mirepro jobs` prints about a bench in the test's folder."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "test.toml").write_text("poll = 0.5\n")
    monkeypatch.setattr(commands.profiles, "find_root", lambda: tmp_path)
    return lambda *words: CliRunner().invoke(commands.jobs_app, words, catch_exceptions=False).stdout


def test_the_shared_cluster_would_show_a_drained_node(cluster: Cluster) -> None:
    """Control of `tidy`."""
    cluster.run("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    assert cluster.run("sinfo", "-h", "-o", "%T", "-p", "main") != "idle"
    cluster.run("scontrol", "update", "nodename=n1", "state=resume")


def test_result(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.finish)
    bench.wait()
    assert [attempt.state for attempt in bench.attempts()] == ["finished"]


def test_error_is_tried_twice_and_shown(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.fail)
    wanted = r"pretrain@a: job \d+: ValueError: seven is not f \(twice the same way\); log: "
    with pytest.raises(JobFailed, match=wanted) as caught:
        bench.wait()
    assert re.search(r'tests/slurm_jobs\.py", line \d+, in fail\n', str(caught.value))
    assert len(bench.attempts()) == 2
    until(lambda: "ValueError: seven is not f" in bench.handle.log.read_text(), 60, "the log's last line")


def test_refusal_is_one_line_and_not_repeated(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.refuse)
    with pytest.raises(JobFailed, match=r"rows\.x: impossible; use y") as caught:
        bench.wait()
    assert "\n" not in str(caught.value)
    assert len(bench.attempts()) == 1


def test_what_sbatch_refuses_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.finish, partition="moon")
    with pytest.raises(UserError, match="invalid partition") as caught:
        bench.wait()
    assert "\n" not in str(caught.value)
    assert not bench.attempts()


def test_every_time_limit_requeues_and_the_job_resumes(cluster: Cluster, tmp_path: Path) -> None:
    """Two of them; the signal comes 30 to 60 s after a start, because Slurm looks at limits twice a minute."""
    bench = Bench(tmp_path, slurm_jobs.count, 1000, 0.3, 2, time=2, grace=90)
    bench.wait(600)
    jobs, firsts = zip(*bench.runs(), strict=True)
    assert len(set(jobs)) == 1, "resubmitted instead of requeued"
    first, second, third = map(int, firsts)
    assert third > second > first == 0, "began from nothing"
    assert bench.handle.log.read_text().count("Calling checkpoint method") == 2
    assert (bench.work / "where").read_text() == "", "in a container that nobody asked for"


def test_control_a_second_time_limit_without_a_requeue_left(cluster: Cluster, tmp_path: Path) -> None:
    """Limits that are told by hand, to be quick: the test above would see that the job was submitted again."""
    bench = Bench(tmp_path, slurm_jobs.count, 1000, 0.3, 2, time=2, grace=90)
    bench.launcher.site = dataclasses.replace(bench.site, requeues=1)
    for number in (1, 2):
        until(lambda number=number: bench.handle.poll() or len(bench.runs()) == number, 120, f"run {number}")
        cluster.run("scancel", "--signal=USR2", bench.handle.job)
    bench.wait()
    assert "timed-out too many times" in bench.attempts()[0].reason
    assert len({job for job, _ in bench.runs()}) == 2


def test_a_held_job_says_so_and_goes_on_when_released(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.finish, options={"hold": True})
    until(lambda: bench.handle.poll() or bench.handle.notes, 60, "remark")
    job = bench.handle.job
    remedy = f"`scontrol release {job}` or `mirepro jobs cancel {job}`"
    assert bench.handle.notes == [
        f"pretrain@a: job {job} does not start by itself (JobHeldUser); cure the cause, then {remedy}"
    ]
    cluster.run("scontrol", "release", job)
    bench.wait()
    assert len(bench.attempts()) == 1


def test_requeue_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.count, 2000, 0.3)
    bench.checkpointed()
    cluster.run("scontrol", "requeue", bench.handle.job)
    bench.wait()
    assert len(bench.attempts()) == 1
    assert int(bench.runs()[1][1]) > 0


def test_a_requeued_training_goes_on_within_its_epoch(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a", slurm_jobs.linger, data, True)
    until(lambda: bench.handle.poll() or (bench.work / "state" / checkpoint.NAME).exists(), 120, "checkpoint")
    cluster.run("scontrol", "requeue", bench.handle.job)
    bench.wait()
    (job, first), (again, second) = bench.runs()
    assert (again, first) == (job, "0")
    assert int(second) % 5 > 0, "an epoch has five steps"
    assert bytes_of(bench.work / "out") == bytes_of(train(run("la"), data, tmp_path / "b"))


@pytest.mark.parametrize("sign", ["USR2", "TERM"])
def test_a_signal_leaves_a_checkpoint(cluster: Cluster, data: Path, tmp_path: Path, sign: str) -> None:
    """The time limit's requeues the job, Slurm's word before a preemption lets it go on; none comes of itself here."""
    bench = Bench(tmp_path / "a", slurm_jobs.linger, data, False)
    bench.running()
    time.sleep(2.0)
    cluster.run("scancel", f"--signal={sign}", bench.handle.job)
    if sign == "TERM":
        until((bench.work / "state" / checkpoint.NAME).exists, 60, "checkpoint")
        assert len(bench.runs()) == 1
        cluster.run("scontrol", "requeue", bench.handle.job)
    bench.wait()
    (job, first), (again, second) = bench.runs()
    assert (again, first) == (job, "0")
    assert int(second) > 0
    assert bytes_of(bench.work / "out") == bytes_of(train(run("la"), data, tmp_path / "b"))


def test_a_signal_to_two_ranks_requeues_both_with_a_checkpoint(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "a", slurm_jobs.linger, data, False, 2, nodes=2)
    until(lambda: bench.handle.poll() or len(bench.runs()) == 2, 120, "both ranks")
    time.sleep(1.0)
    cluster.run("scancel", "--signal=USR2", bench.handle.job)
    bench.wait()
    jobs, steps = zip(*bench.runs(), strict=True)
    assert len(set(jobs)) == 1, "resubmitted instead of requeued"
    assert steps[:2] == ("0", "0")
    assert steps[2] == steps[3] > "0"
    assert bytes_of(bench.work / "out") == bytes_of(train(run("la", shards=2), data, tmp_path / "b"))


@pytest.mark.parametrize(
    "own", [{}, {"extra": "SlurmctldParameters=preempt_send_user_signal", "accounts": True}], indirect=True
)
def test_preemption(own: Cluster, tmp_path: Path) -> None:
    """Where a signal comes it is heeded, where none comes the job resumes from its own checkpoint."""
    told = "preempt_send_user_signal" in own.run("scontrol", "show", "config")
    section = {"partition": "polite" if told else "main", "options": {"exclusive": True, "nodelist": "n1"}}
    bench = Bench(tmp_path, slurm_jobs.count, 2000, 0.3, **section)
    bench.checkpointed()
    own.run("srun", "--partition=urgent", "--nodelist=n1", "--exclusive", "--chdir=/", "true")
    bench.wait()
    assert len(bench.attempts()) == 1
    assert int(bench.runs()[1][1]) > 0
    assert ("Calling checkpoint method" in bench.handle.log.read_text()) == told


def test_cancelled_job_is_not_submitted_again(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(tmp_path, slurm_jobs.hold)
    bench.running()
    assert living(bench)
    cluster.run("scancel", bench.handle.job)
    with pytest.raises(JobFailed, match="cancelled"):
        bench.wait()
    until(lambda: not living(bench), 60, "the end of the process")
    assert len(bench.attempts()) == 1
    (bench.work / "go").touch()
    again = Bench(tmp_path, slurm_jobs.hold)  # a new command starts anew
    again.wait()
    assert again.attempts()[0].job != bench.handle.job


ARRAY = """#!/bin/sh
#SBATCH --array=0-{last} --time=5 --output={folder}/log-%a --requeue
cd {root} && exec {python} -c '{head}' {root} {tests} {folder}/$SLURM_ARRAY_TASK_ID finish
"""


def test_heads_in_the_tasks_of_an_array(cluster: Cluster, tmp_path: Path) -> None:
    """Each task launches a stage; neither its array's ids nor its limits get into the stage's job."""
    script = tmp_path / "array.sh"
    values = {"last": 1, "root": HERE.parent, "tests": HERE, "folder": tmp_path, "python": sys.executable}
    script.write_text(ARRAY.format(head=HEAD.replace("'", '"'), **values))
    array = cluster.run("sbatch", "--parsable", str(script))
    until(lambda: not cluster.run("squeue", "--noheader"), 300, "the array's end")
    for task in ("0", "1"):
        bench = Bench(tmp_path / task, slurm_jobs.finish)
        (attempt,) = bench.attempts() or bench.launcher.ledger.read("f").past  # type: ignore[union-attr]
        assert attempt.state == "finished", (tmp_path / f"log-{task}").read_text()
        assert attempt.job.isdigit()
        assert attempt.job not in (array, str(int(array) + 1))
        assert list((tmp_path / task / attempt.folder).glob(f"{attempt.job}_0_result.pkl"))


def test_an_array_in_the_queue_is_no_job_of_ours(cluster: Cluster, tmp_path: Path) -> None:
    """A waiting array's row has no plain id."""
    wait = ("sbatch", "--parsable", "--array=0-3%1", "--output=/dev/null", "--chdir=/", "--wrap=sleep 900")
    array = cluster.run(*wait)
    assert f"{array}_[" in cluster.run("squeue", "--noheader", "--format=%i")
    bench = Bench(tmp_path, slurm_jobs.finish)
    bench.wait()
    assert len(bench.attempts()) == 1
    cluster.run("scancel", array)


HEAD = """
import sys
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import slurm_bench, slurm_jobs
bench = slurm_bench.Bench(Path(sys.argv[3]), getattr(slurm_jobs, sys.argv[4]))
bench.launcher.run(bench.ticket)
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP])
def test_head_goes_and_comes_back(cluster: Cluster, tmp_path: Path, sign: int) -> None:
    command = [sys.executable, "-c", HEAD, str(HERE.parent), str(HERE), str(tmp_path), "hold"]
    head = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    runs = tmp_path / ".mirepro" / "work" / "f" / "runs"
    until(lambda: runs.exists() and runs.read_text(), 120, "start")
    os.kill(head.pid, sign)
    error = head.communicate(timeout=120)[1]
    bench = Bench(tmp_path, slurm_jobs.hold)
    until(lambda: bench.handle.poll() or bench.handle.job, 120, "the job in the queue")
    assert not bench.handle.poll()
    assert bench.handle.job == runs.read_text().split()[0]
    if sign == signal.SIGINT:
        assert f"detached; job {bench.handle.job} continues; rerun to re-attach" in error
    (bench.work / "go").touch()
    bench.wait()
    assert len(bench.attempts()) == len(bench.runs()) == 1


def test_controller_restarts(own: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PATIENCE", 2.0)
    bench = Bench(tmp_path, slurm_jobs.hold)
    bench.running()
    own.kill("slurmctld", signal.SIGKILL)
    bench.launcher.scheduler._taken = -float("inf")  # type: ignore[attr-defined]
    assert not bench.handle.poll()
    assert bench.handle.status.phase == "unreachable"
    own.control()
    (bench.work / "go").touch()
    bench.wait()
    assert len(bench.attempts()) == 1


@pytest.mark.parametrize("own", [{"patience": 5, "accounts": True}], indirect=True)
def test_node_goes_down(own: Cluster, tmp_path: Path) -> None:
    """The scheduler takes the job from the dead node and runs it on the other; it resumes."""
    bench = Bench(tmp_path, slurm_jobs.count, 2000, 0.3)
    bench.checkpointed()
    node = own.run("squeue", "--noheader", "--format=%N", f"--jobs={bench.handle.job}")
    assert node in ("n1", "n2")
    _kill_job(own, bench)
    own.kill(f"slurmd-{node}", signal.SIGKILL)
    bench.wait()
    assert int(bench.runs()[-1][1]) > 0
    assert len(bench.attempts()) == 1, "Slurm requeued it, nobody submitted it again"
    assert {job for job, _ in bench.runs()} == {bench.handle.job}


def _kill_job(cluster: Cluster, bench: Bench) -> None:
    """A dead node takes its processes along: step managers and tasks of the job, not of another cluster's."""
    job = bench.handle.job
    for path in Path("/proc").glob("[0-9]*"):
        try:
            step = (path / "cmdline").read_bytes().startswith(f"slurmstepd: [{job}.".encode())
            step = step and any(f.readlink().is_relative_to(cluster.folder) for f in (path / "fd").iterdir())
            task = f"SLURM_JOB_ID={job}\0".encode() in (path / "environ").read_bytes()
            mine = str(bench.root).encode() in (path / "environ").read_bytes() + (path / "cmdline").read_bytes()
        except OSError:
            continue
        if (step or (task and mine)) and int(path.name) != os.getpid():
            with suppress(ProcessLookupError):  # it has ended since it was looked at
                os.kill(int(path.name), signal.SIGKILL)


@pytest.mark.parametrize("own", [{"age": 2}], indirect=True)
def test_forgotten_job_without_accounts(own: Cluster, tmp_path: Path) -> None:
    """The queue has forgotten the job and nobody keeps accounts: it counts as lost and is submitted again."""
    bench = Bench(tmp_path, slurm_jobs.count, 2000, 0.3)
    bench.checkpointed()
    own.run("scancel", bench.handle.job)
    until(lambda: not own.run("squeue", "-h", "--states=all"), 120, "forgetting")
    bench.wait()
    first, second = bench.attempts()
    assert first.reason.startswith("LOST")
    assert bench.handle.notes == [f"pretrain@a: job {first.job}: {first.reason}; submitted again"]
    assert second.state == "finished"


@pytest.mark.parametrize("own", [{"age": 2, "accounts": True}], indirect=True)
def test_forgotten_job_with_accounts(own: Cluster, tmp_path: Path) -> None:
    """The queue has forgotten the job, the accounts have not: nothing is submitted again."""
    bench = Bench(tmp_path, slurm_jobs.hold)
    bench.running()
    own.run("scancel", bench.handle.job)
    until(lambda: not own.run("squeue", "-h", "--states=all"), 120, "forgetting")
    asked = ("sacct", "--noheader", "--allocations", "--format=State%40", f"--jobs={bench.handle.job}")
    until(lambda: "CANCELLED" in own.run(*asked), 120, "the accounts")
    with pytest.raises(JobFailed, match="CANCELLED by 0"):
        bench.wait()
    assert len(bench.attempts()) == 1


def test_two_nodes_of_two_ranks_give_the_bits_of_one_process(cluster, data, tmp_path):
    bench = Bench(tmp_path / "jobs", slurm_jobs.train, data, nodes=2, tasks=2)
    bench.wait(600)
    until(lambda: len(list(bench.handle.log.parent.glob("*_result.pkl"))) == 4, 120, "the other ranks' ends")
    alone = bytes_of(train(run("ring", shards=4), data, tmp_path / "alone"))
    assert bytes_of(bench.work / "ring" / "out").items() >= alone.items()


CAUSE = re.compile(
    r'tests/ranks\.py", line \d+, in train_step\n'
    r'(\[rank2\]:)? +raise ZeroDivisionError\("the cause"\)'  # in a log torch names the rank
)


def test_a_failed_rank_ends_the_job_and_speaks_first(cluster, data, tmp_path, monkeypatch, jobs):
    """Its traceback stands before anything of rank 0, whose log, the control, lacks it."""
    monkeypatch.setenv("MIREPRO_TEST_FAIL", "2:4")
    bench = Bench(tmp_path, slurm_jobs.train, data, nodes=2, tasks=2)
    bench.launcher.site = dataclasses.replace(bench.site, retries=0)
    with pytest.raises(JobFailed, match="ZeroDivisionError: the cause"):
        bench.wait(600)
    until(lambda: not living(bench), 120, "the end of the other ranks")
    log, own = bench.handle.log, tmp_path / "stage.log"
    first = log.with_name(f"{bench.handle.job}_0_log.out").read_text()
    assert "global_rank=0(4)" in first
    assert not CAUSE.search(first)
    stage = waves.Running("pretrain@a", Remote(bench.handle, own, 1.0), own, own)
    until(lambda: stage.poll() == 1, 60, "the stage's end")
    assert log.name == f"{bench.handle.job}_2_log.out"
    for shown in (own.read_text(), waves._complaint(stage), jobs("logs", bench.handle.job)):
        assert str(log) in shown
        found = CAUSE.search(shown)
        assert found, shown
        assert "global_rank=0(4)" not in shown[: found.start()]
    assert shown.index(first) > found.end()


@pytest.mark.parametrize("kept", [True, False])
def test_slurm_ends_a_job_that_lost_a_rank(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    """With nobody there to look after it. Control: without srun's option the others go on."""
    if not kept:
        plain = slurm.parameters
        monkeypatch.setattr(slurm, "parameters", lambda *a: plain(*a) | {"srun_args": []})
    bench = Bench(tmp_path, slurm_jobs.one_rank_less, False, nodes=2)
    assert not bench.handle.poll()  # submits
    until((bench.work / "waits").exists, 120, "rank 0")
    failed = bench.handle.log.with_name(f"{bench.handle.job}_1_result.pkl")
    until(failed.exists, 60, "the error of rank 1")
    if kept:
        until(lambda: not cluster.run("squeue", "--noheader") and not living(bench), 60, "the job's end")
    else:
        time.sleep(5.0)
        assert cluster.run("squeue", "--noheader", "--format=%T") == "RUNNING"
        cluster.run("scancel", bench.handle.job)


def test_a_rank_that_refuses_takes_the_job_along(cluster: Cluster, tmp_path: Path) -> None:
    """It ends as if all were well, and the rest waits for it: the head gives up, so the job has to go. No orphans."""
    bench = Bench(tmp_path, slurm_jobs.one_rank_less, True, nodes=2)
    assert not bench.handle.poll()  # submits
    until((bench.work / "waits").exists, 120, "rank 0")
    assert living(bench)
    with pytest.raises(JobFailed, match=r"rows\.x: impossible; use y"):
        bench.wait()
    until(lambda: not cluster.run("squeue", "--noheader") and not living(bench), 60, "the job's end")
    assert len(bench.attempts()) == 1


HERE_JOBS = """
import pathlib
from mirepro.launch import commands
commands.profiles.find_root = pathlib.Path.cwd
commands.jobs_app()
"""


def test_the_commands_about_jobs(cluster: Cluster, tmp_path: Path, jobs: Callable[..., str]) -> None:
    """Control: neither a job at work nor a young entry is forgotten, and another job is not cancelled."""
    other = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--chdir=/", "--wrap=sleep 900")
    bench = Bench(tmp_path, slurm_jobs.hold)
    bench.running()
    job = bench.handle.job
    node = cluster.run("squeue", "--noheader", "--format=%N", f"--jobs={job}")
    assert re.search(rf"^{job} +pretrain@a +test +RUNNING +{node} ", jobs("list"), re.MULTILINE)
    assert "global_rank=0(1)" in jobs("logs", job)
    assert jobs("prune", "--days", "0") == "0 entries removed\n"
    line = [sys.executable, "-c", HERE_JOBS, "logs", "-f", job]
    follow = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert follow.stdout is not None
    assert any("global_rank=0(1)" in text for text in follow.stdout), "not before the job ends"
    assert follow.poll() is None
    assert jobs("cancel", job) == f"{job} pretrain@a: cancelled\n"
    until(lambda: cluster.run("squeue", "--noheader", "--format=%i") == other, 60, "its end")
    assert follow.wait(60) == 0
    cluster.run("scancel", other)
    assert re.search(rf"^{job} .* CANCELLED .* cancelled by `mirepro jobs cancel`$", jobs("list"), re.MULTILINE)
    (bench.work / "go").touch()
    again = Bench(tmp_path, slurm_jobs.hold)
    again.wait()
    assert re.search(rf"^{again.handle.job} .* FINISHED ", jobs("list"), re.MULTILINE)
    assert jobs("prune") == "0 entries removed\n"
    until(lambda: jobs("prune", "--days", "0") == "1 entries removed\n", 60, "the end of its processes")
    assert "pretrain@a" not in jobs("list")


def test_pipeline_gives_the_same_lock(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    """`MIREPRO_LAUNCH=slurm dvc repro`, and the same in parallel, end in the lock of a serial run without Slurm."""
    locks = []
    for name, launch, module, words in (
        ("plain", "inline", "dvc", ("repro",)),
        ("serial", "slurm", "dvc", ("repro", "evaluate@ball-s0")),
        ("parallel", "slurm", "mirepro", ("repro", "--jobs", "4")),
    ):
        miniature = Miniature(root, tmp_path / name)
        result = miniature.run(*words, module=module, env=miniature.environment | {"MIREPRO_LAUNCH": launch})
        assert result.returncode == 0, result.stderr
        locks.append(yaml.safe_load((miniature.root / "dvc.lock").read_text()))
        jobs = len(list((miniature.root / ".mirepro" / "jobs").glob("*.json")))
        assert jobs == {"plain": 0, "serial": 2, "parallel": 7}[name]
    assert locks[0]["stages"] == locks[2]["stages"]
    assert {name: locks[0]["stages"][name] for name in locks[1]["stages"]} == locks[1]["stages"]
