"""Commands about jobs, and jobs of this machine that outlive the command."""

import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import slurm_jobs
from cluster import until, working
from miniature import Miniature

from mirepro import execution, profiles, stages
from mirepro.errors import UserError
from mirepro.launch import commands, probe, scheduler, slurm
from mirepro.launch.container import Container, enroot
from mirepro.launch.launcher import outcome, uninterrupted
from mirepro.launch.ledger import Attempt, Entry, Status
from mirepro.launch.scheduler import Local, Request, Unreachable
from mirepro.launch.task import BARREN, Task
from mirepro.site import Section, Site

DIGEST = "registry.example.org/mirepro@sha256:0123"


def test_request_becomes_options(tmp_path: Path) -> None:
    section = Section(partition="gpu", gpus=2, nodes=3, tasks=2, memory="8G", time="2:00:00", options={"nice": 5})
    values = slurm.parameters(Request("a", tmp_path, tmp_path, print, section, 1, 4))
    assert (values["time"], values["nodes"], values["ntasks_per_node"], values["gpus_per_node"]) == (120, 3, 2, 2)
    assert (values["cpus_per_task"], values["mem"], values["partition"]) == (4, "8G", "gpu")
    assert values["additional_parameters"] == {"requeue": True, "nice": 5}
    assert values["srun_args"] == ["--cpus-per-task=4", "--kill-on-bad-exit=1"]
    assert "account" not in values
    assert "teardown" not in values


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("slurm_load_jobs error: Connection reset by peer", Unreachable),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", Unreachable),
        ("slurm_load_jobs error: Socket timed out on send/recv operation", Unreachable),
        ("slurm_load_jobs error: Zero Bytes were transmitted or received", Unreachable),
        ("slurm_load_jobs error: Protocol authentication error", Unreachable),
        ("squeue: error: Munge encode failed: Failed to connect to munged", Unreachable),
        ("slurm_load_jobs error: Invalid user id", UserError),
    ],
)
def test_a_controller_that_does_not_answer_is_no_refusal(
    said: str, kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it is being restarted; the control is a refusal."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(kind, match=re.escape(said.partition(": ")[2])):
        slurm.command("squeue")


def test_container_commands(tmp_path: Path) -> None:
    def words(runtime: str) -> Container:
        return Container(tmp_path, Section(image=DIGEST, runtime=runtime, gpus=1, binds=("/data", "/a:/b")))

    podman = words("podman").python()
    assert podman.startswith("sh -c 'export MIREPRO_CLIENT=$$; ")
    assert "exec $shield podman run --rm " in podman
    assert f"--volume {tmp_path}:{tmp_path} --volume /data:/data --volume /a:/b" in podman
    assert "SLURM_*" in podman
    assert podman.endswith(f"""--entrypoint python3 {DIGEST} "$@"' podman""")
    assert f"--nv --pwd {tmp_path}" in words("apptainer").python()
    assert words("apptainer").python().endswith(f"docker://{DIGEST} python3")
    assert words("pyxis").python() == "python3"
    assert words("pyxis").srun[0] == f"--container-image={enroot(DIGEST)}"


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("registry.example.org:5000/lab/mirepro@sha256:ab", "registry.example.org:5000#lab/mirepro:sha256:ab"),
        ("localhost/mirepro@sha256:ab", "localhost#mirepro:sha256:ab"),
        ("lab/mirepro@sha256:ab", "lab/mirepro:sha256:ab"),  # Docker Hub
    ],
)
def test_pyxis_wants_the_registry_apart(image: str, wanted: str) -> None:
    assert enroot(image) == wanted


def test_image_is_part_of_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the site names it for the stage's own class; control: what a site says of other classes is not."""
    profile = profiles.load(Path(__file__).resolve().parent.parent, "desk")

    def mark(**images: str) -> str:
        where = Site("lab", sections={kind: Section(image=images.get(kind)) for kind in stages.JOBS})
        monkeypatch.setattr(stages.site, "chosen", lambda *_: where)
        name, job = stages.described(profile, "toy", None)
        return execution.fingerprint(profile.root, name, replace(job, needs=()))

    assert len({mark(), mark(toy=DIGEST), mark(toy=DIGEST + "4")}) == 3
    assert mark(evaluate=DIGEST) == mark()


def test_job_whose_limit_is_too_short_gives_up(tmp_path: Path) -> None:
    def again(seconds: float) -> Task:
        task = Task(print, tmp_path, seconds, 1.0)
        task()
        for _ in range(BARREN - 1):
            task.checkpoint()
        return task

    with pytest.raises(RuntimeError, match="without a new checkpoint; raise `time`"):
        again(-1.0).checkpoint()  # every run reaches its limit
    again(3600.0).checkpoint()  # preempted long before it
    task = again(-1.0)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step").touch()
    task.checkpoint()


TOLD = """
import os, signal, sys, time
from pathlib import Path
from mirepro.launch.task import Task
from mirepro.notice import NOTICE
heard, answers, grace = (int(word) for word in sys.argv[1:])
signal.signal(signal.SIGUSR2, lambda *_: sys.exit(9))  # as submitit's, which requeues and exits

def call():
    os.kill(os.getpid(), signal.SIGTERM)
    assert NOTICE.given
    NOTICE.heard = bool(heard)
    os.kill(os.getpid(), signal.SIGUSR2)
    print("goes on", flush=True)
    if answers:
        NOTICE.answer()
    time.sleep(60)

Task(call, Path("work"), 60.0, grace)()
"""


@pytest.mark.parametrize(
    ("heard", "answers", "grace", "said"), [(0, 0, 1000, ""), (1, 0, 4, "goes on\n"), (1, 1, 1000, "goes on\n")]
)
def test_a_job_that_is_told_to_stop_is_requeued(
    heard: int, answers: int, grace: int, said: str, tmp_path: Path
) -> None:
    """At once where no training has begun, else with its checkpoint, or when patience, half the grace, is over."""
    command = [sys.executable, "-c", TOLD, *map(str, (heard, answers, grace))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (9, said), done.stderr


@pytest.mark.parametrize(("lost", "known"), [("rank 1: lost the other ranks (closed); ...", False), ("bad", True)])
def test_a_rank_that_lost_the_others_is_no_refusal(lost: str, known: bool, tmp_path: Path) -> None:
    """They may have been requeued; the control is what a rank refuses itself."""
    (tmp_path / "7_1_result.pkl").write_bytes(pickle.dumps(("success", lost)))
    assert (outcome(tmp_path, "7") is not None) == known


def test_local_job_is_known_by_its_start_not_its_number_alone(tmp_path: Path) -> None:
    local = Local()
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        identity = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
        attempt = Attempt("t", "f", "submitted", local.cluster(), f"{sleeper.pid}.{identity}")
        stranger = Attempt("t", "f", "submitted", local.cluster(), f"{sleeper.pid}.1")
        reboot = Attempt("t", "f", "submitted", local.cluster() + "0", attempt.job)
        elsewhere = Attempt("t", "f", "submitted", "mars:1", attempt.job)
        seen = [local.status(item, "x").phase for item in (attempt, stranger, reboot, elsewhere)]
        assert seen == ["running", "absent", "absent", "unreachable"]
        with pytest.raises(UserError, match="started on mars, look there"):
            local.cancel(elsewhere, "x")
        assert local.status(attempt, "x").alive
        local.cancel(attempt, "x")
        until(lambda: local.status(attempt, "x").phase == "absent", 60, "its end")
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_finished_job_is_over_when_its_processes_are() -> None:
    """Its files are not forgotten before: they may still be written."""
    local = Local()
    sleeper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    attempt = Attempt("t", "f", "finished", local.cluster(), scheduler._identity(sleeper.pid))
    known = commands.Known(Entry("f", "toy", "local", [attempt]), attempt, SimpleNamespace(scheduler=local))
    try:
        assert (known.status.state, known.over) == ("FINISHED", False)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert known.over


def test_a_late_rank_makes_no_folder_for_a_result_that_was_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # a task tells its process where to report
    Task(lambda: None, tmp_path / "work", 60.0, 1.0)()
    assert not (tmp_path / "work").exists()


class Lingering:
    """A scheduler whose job still writes into its folder when its report stands."""

    def __init__(self) -> None:
        self.folder, self.looks = Path(), 0

    def cluster(self) -> str:
        return "here"

    def submit(self, request: Request) -> str:
        self.folder = request.folder
        request.call()
        return "1"

    def status(self, attempt: Attempt, name: str) -> Status:
        (self.folder / f"{self.looks}_result.pkl").touch()
        self.looks += 1
        return Status("running" if self.looks < 3 else "ended")


def test_the_probe_waits_for_the_end_of_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lingering = Lingering()
    monkeypatch.setattr(probe, "create", lambda place: lingering)
    assert "ran on" in list(probe.probe(tmp_path, "local"))[1]
    assert lingering.looks == 3
    assert not lingering.folder.exists()


def test_the_probe_refuses_a_section_without_the_gpus_that_a_profile_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "create", lambda place: Lingering())
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/here.toml").write_text("executor = 'local'\n[pretrain]\ngpus = 1\n")
    with pytest.raises(UserError, match=r"here: gpus: detect asks for none, but detect\.device is cuda .* tasks \(1\)"):
        list(probe.probe(tmp_path, "here", on_gpus=("pretrain", "detect")))
    assert list(probe.probe(tmp_path, "here", on_gpus=("pretrain",))), "control"


def test_the_probe_refuses_ranks_that_cannot_share_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "create", lambda place: Lingering())
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/here.toml").write_text("executor = 'local'\n[pretrain]\ntasks = 4\n")
    message = r"here: nodes, tasks: 4 ranks cannot share pretrain\.bank_shards 6 equally; ask for 1, 2, 3, 6 of them"
    with pytest.raises(UserError, match=message):
        list(probe.probe(tmp_path, "here", shards={"pretrain.shards": 8, "pretrain.bank_shards": 6}))
    control = probe.probe(tmp_path, "here", shards={"pretrain.shards": 8, "pretrain.bank_shards": 4})
    assert next(control) == "here: local on here"


@pytest.fixture
def miniature(root: Path, tmp_path: Path) -> Miniature:
    """A miniature whose jobs run on this machine."""
    return Miniature(root, tmp_path / "repo")


@pytest.mark.slow
def test_local_jobs_and_the_commands_about_them(miniature: Miniature) -> None:
    result = miniature.run("repro", "--launch", "local", "--jobs", "3")
    assert result.returncode == 0, result.stderr
    assert "pretrain@ball-s0 is job " in result.stderr
    until(lambda: not working(miniature.root), 60, "the end of the processes")
    listing = miniature.run("jobs", "list").stdout
    assert listing.count("FINISHED") == 7
    for words in (("logs", "toy"), ("logs", "-f", "toy")):
        assert "Job completed successfully" in miniature.run("jobs", *words).stdout
    assert "0 entries removed" in miniature.run("jobs", "prune").stdout
    assert "7 entries removed" in miniature.run("jobs", "prune", "--days", "0").stdout
    assert {path.suffix for path in (miniature.root / ".mirepro" / "jobs").iterdir()} == {".lock"}
    assert "not in the ledger" in miniature.run("jobs", "cancel", "toy").stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("children", [True, False])
def test_an_interruption_waits_for_the_submission(number: signal.Signals, children: bool) -> None:
    """Another thread takes the signal where the main one blocks it; the control is the blocking alone."""

    class Told(Exception):
        pass

    def tell(*_: object) -> None:
        raise Told

    def interrupt(milliseconds: int) -> None:
        os.kill(os.getpid(), number)
        for _ in range(milliseconds):
            time.sleep(0.001)

    def submit() -> None:
        with uninterrupted(children):
            assert (number in signal.pthread_sigmask(signal.SIG_BLOCK, ())) == children  # what a child inherits
            interrupt(100)
            done.append("submitted")
        for _ in range(60_000):  # the other thread may take its time
            time.sleep(0.001)

    done: list[str] = []
    stop, mask = threading.Event(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    other = threading.Thread(target=stop.wait)
    other.start()
    before = signal.signal(number, tell)
    try:
        with pytest.raises(Told):
            submit()
        assert done == ["submitted"]
        assert signal.getsignal(number) is tell
        signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        with pytest.raises(Told):
            interrupt(60_000)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(number, before)
        stop.set()
        other.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_reproduction_detaches_and_comes_back(
    number: signal.Signals, miniature: Miniature, tmp_path: Path
) -> None:
    (miniature.root / "slow").touch()
    command = [sys.executable, "-m", "mirepro", "repro", "pretrain@ring-s0", "--launch", "local"]
    head = subprocess.Popen(command, cwd=miniature.root, env=miniature.environment, stderr=subprocess.PIPE, text=True)
    entries = miniature.root / ".mirepro" / "jobs"
    until(lambda: any('"state": "submitted"' in path.read_text() for path in entries.glob("*.json")), 120, "start")
    head.send_signal(number)
    error = head.communicate(timeout=120)[1]
    assert head.returncode == 130
    found = re.search(r"detached; job (\d+) continues; rerun to re-attach, `mirepro jobs cancel \1` to stop", error)
    assert found, error
    assert f"{found[1]}  pretrain@ring-s0  local  RUNNING" in miniature.run("jobs", "list").stdout
    said = tmp_path / "said"
    with said.open("w") as file:
        head = subprocess.Popen(command, cwd=miniature.root, env=miniature.environment, stderr=file)
    until(lambda: f"pretrain@ring-s0 is job {found[1]}\n" in said.read_text(), 120, "attaching again")
    assert f"{found[1]} pretrain@ring-s0: cancelled" in miniature.run("jobs", "cancel", found[1]).stdout
    assert head.wait(120) == 1
    assert "cancelled by `mirepro jobs cancel`" in said.read_text()
    (miniature.root / "slow").unlink()
    again = miniature.run("repro", "pretrain@ring-s0", "--launch", "local")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_log_out_ends_a_command_and_leaves_its_job(miniature: Miniature, tmp_path: Path) -> None:
    """The whole process group is told; control: of a head under nohup nothing ends."""
    (miniature.root / "slow").touch()
    command = [sys.executable, "-m", "mirepro", "stage", "pretrain", "ring-s0"]
    environment = miniature.environment | {"MIREPRO_LAUNCH": "local"}
    assert miniature.run("stage", "code").returncode == 0

    def start(said: Path, *before: str) -> tuple[subprocess.Popen[bytes], str]:
        options = {"cwd": miniature.root, "env": environment, "start_new_session": True}
        with said.open("w") as file:
            head = subprocess.Popen([*before, *command], stderr=file, stdin=subprocess.DEVNULL, **options)
        until(lambda: " is job " in said.read_text(), 120, "the job")
        os.killpg(head.pid, signal.SIGHUP)
        return head, said.read_text().split()[-1]

    head, job = start(tmp_path / "first")
    assert head.wait(60) == -signal.SIGHUP
    assert f"{job}  pretrain@ring-s0  local  RUNNING" in miniature.run("jobs", "list").stdout
    head, again = start(tmp_path / "second", "nohup")
    assert again == job, "attached"
    time.sleep(1.0)
    assert head.poll() is None
    assert f"{job} pretrain@ring-s0: cancelled" in miniature.run("jobs", "cancel", job).stdout
    assert head.wait(60) == 1
    assert "cancelled by `mirepro jobs cancel`" in (tmp_path / "second").read_text()


@pytest.mark.slow
def test_failures_are_summed_up(miniature: Miniature) -> None:
    miniature.edit("mirepro/toy.py", "def toy(params: ToyParams, out):", "def toy(params: ToyParams, out):\n    1 / 0")
    result = miniature.run("repro", "--launch", "local", "--keep-going", "--jobs", "3")
    assert result.returncode == 1
    assert "ZeroDivisionError: division by zero (twice the same way); log: " in result.stderr
    again = r"^toy: job \d+: ZeroDivisionError: division by zero; submitted again$"
    assert re.search(again, result.stderr, re.MULTILINE)
    assert "not run: tables, report" in result.stderr
    assert (miniature.root / "metrics/desk/evaluate/ring-s0.json").exists()


@pytest.mark.slow
def test_code_that_changed_after_submission_is_refused(miniature: Miniature) -> None:
    """Locks are made before the submission; a job that finds other code must not compute under them."""
    assert miniature.run("stage", "code").returncode == 0
    miniature.edit("mirepro/toy.py", "", "\nx = 1\n")
    result = miniature.run("stage", "toy", env=miniature.environment | {"MIREPRO_LAUNCH": "local"})
    assert result.returncode == 1
    assert "parameters, data or code changed after the job was submitted" in result.stderr
    assert re.match(r"toy is job \d+\nmirepro: .*\n\Z", result.stderr)
    assert miniature.run("stage", "code").returncode == 0
    assert miniature.run("stage", "toy", env=miniature.environment | {"MIREPRO_LAUNCH": "local"}).returncode == 0


@pytest.mark.parametrize("setup", [(), ("true", "export A=1")])
def test_submission_cut_short_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setup: tuple[str, ...]) -> None:
    """The controller of a local job is found by its folder, or the shell of its set-up; the job gets its pickle."""
    from mirepro.launch.scheduler import pickled

    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}")
    local, folder = Local(), tmp_path / "job"
    folder.mkdir()
    task, section = Task(lambda: slurm_jobs.hold(tmp_path), tmp_path, 60.0, 1.0), Section(setup=setup)
    request = Request("a", tmp_path, folder, task, section, 0)
    job = local.submit(request)
    until(lambda: local.find("a", folder, 0.0) == job, 10, "its command line, set after its pipe has closed")
    assert local.find("a", tmp_path / "other", 0.0) is None
    local.cancel(Attempt("t", "job", "submitted", local.cluster(), job), "a")
    (folder / f"{'0' * 32}.pkl").touch()
    pickled(folder, "77.1")
    assert (folder / "77_submitted.pkl").exists()
