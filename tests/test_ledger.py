"""The ledger of jobs against a scheduler that does everything real ones do, in any order."""

import os
import pickle
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mirepro.errors import UserError
from mirepro.launch import launcher as launcher_module
from mirepro.launch import ledger
from mirepro.launch.launcher import Handle, JobFailed, Launcher, Ticket, outcome
from mirepro.launch.ledger import Attempt, Decision, Failure, Sight, Status, decide
from mirepro.launch.scheduler import Request, Unreachable
from mirepro.site import Section, Site

RETRIES = 1


class Killed(BaseException):
    """Stands for kill -9 of the head."""


@dataclass
class Job:
    """A job of the fake scheduler."""

    name: str
    folder: Path
    status: Status


class Fake:
    """A scheduler in memory; ids start at 1 again in every new cluster.

    Attributes:
        crash: Kills the head "before" or "after" the next submission.
        answers: Whether it can be reached.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.crash = ""
        self.answers, self.count = True, 0

    def cluster(self) -> str:
        self._reach()
        return "fake"

    def submit(self, request: Request) -> str:
        self._reach()
        if self._crashes("before"):
            raise Killed
        self.count += 1
        job = str(len(self.jobs) + 1)
        self.jobs[job] = Job(request.name, request.folder, Status("queued", "PENDING"))
        if self._crashes("after"):
            raise Killed
        return job

    def find(self, name: str, folder: Path, submitted: float) -> str | None:
        self._reach()
        return next((job for job, item in self.jobs.items() if item.name == name), None)

    def status(self, attempt: Attempt, name: str) -> Status:
        self._reach()
        job = self.jobs.get(attempt.job)
        return job.status if job is not None and job.name == name else Status("absent")

    def cancel(self, attempt: Attempt, name: str) -> None:
        if self.status(attempt, name).alive:
            self.jobs[attempt.job].status = Status("ended", "CANCELLED")

    def alive(self) -> list[Job]:
        return [job for job in self.jobs.values() if job.status.alive and job.name.startswith("pretrain@a.")]

    def _reach(self) -> None:
        if not self.answers:
            raise Unreachable("slurmctld does not answer")

    def _crashes(self, when: str) -> bool:
        now, self.crash = self.crash == when, "" if self.crash == when else self.crash
        return now


def make(root: Path, scheduler: Fake, settle: float = 0.0) -> tuple[Launcher, Ticket]:
    """A launcher and the one computation that the tests launch."""
    site = Site("fake", settle=settle, retries=RETRIES, sections={"pretrain": Section()})
    work = root / ".mirepro" / "work" / "f"
    return Launcher(root, site, scheduler), Ticket("pretrain@a", "pretrain", "f", work, print, 1)


class Life(RuleBasedStateMachine):
    """One fingerprint through submissions, ends of every kind, killed heads and new clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name)
        self.fake = Fake()
        self.launcher, self.ticket = make(self.root, self.fake)
        (self.ticket.work / "state").mkdir(parents=True)
        self.handle: Handle = self.launcher.start(self.ticket)

    def teardown(self) -> None:
        """Whatever happened, a scheduler that answers and completes jobs brings the result."""
        self.fake.answers, self.fake.crash = True, ""
        for _ in range(3):
            for job in self.fake.alive():
                self._finish(job)
            if self._poll():
                break
        else:
            raise AssertionError("the result never came")
        self.folder.cleanup()

    def _poll(self) -> bool:
        """Polls; a failure for good is followed by the same command once more."""
        before, finished = self.fake.count, self.ticket.finished
        try:
            done = self.handle.poll()
        except JobFailed:
            assert not self.fake.alive(), "given up, though its job is alive"
            assert not finished, "given up, though the result stands"
            self.handle = self.launcher.start(self.ticket)
            return False
        except Killed:
            self.restart_head()
            return False
        assert not (finished and self.fake.count > before), "submitted though the result stands"
        assert done or not finished or not self.fake.answers
        return done

    def _finish(self, job: Job) -> None:
        (self.ticket.work / "finished").mkdir(exist_ok=True)
        job.status = Status("ended", "COMPLETED")

    def _one(self) -> Job:
        return self.fake.alive()[0]

    @rule(crash=st.sampled_from(["", "before", "after"]))
    def poll(self, crash: str) -> None:
        """Looks; where that leads to a submission, the head may die in it."""
        self.fake.crash = crash
        self._poll()
        self.fake.crash = ""

    @rule()
    def restart_head(self) -> None:
        self.launcher, self.ticket = make(self.root, self.fake)
        self.handle = self.launcher.start(self.ticket)

    @rule(answers=st.booleans())
    def controller(self, answers: bool) -> None:
        self.fake.answers = answers

    @precondition(lambda self: self.fake.alive())
    @rule()
    def run(self) -> None:
        self._one().status = Status("running", "RUNNING", "n1")

    @precondition(lambda self: self.fake.alive())
    @rule()
    def requeue(self) -> None:
        self._one().status = Status("queued", "PENDING", detail="BeginTime")

    @precondition(lambda self: self.fake.alive())
    @rule()
    def checkpoint(self) -> None:
        (self.ticket.work / "state" / "checkpoint").write_text(str(time.monotonic_ns()))

    @precondition(lambda self: self.fake.alive())
    @rule()
    def finish(self) -> None:
        self._finish(self._one())

    @precondition(lambda self: self.fake.alive())
    @rule(text=st.sampled_from(["ValueError: a", "ValueError: b"]), lives=st.booleans())
    def fail(self, text: str, lives: bool) -> None:
        """A rank fails; the others, and with them the job, may live on."""
        job = self._one()
        number = next(key for key, item in self.fake.jobs.items() if item is job)
        (job.folder / f"{number}_0_result.pkl").write_bytes(pickle.dumps(("error", f"Traceback\n{text}\n")))
        if not lives:
            job.status = Status("ended", "FAILED", detail="1:0")

    @precondition(lambda self: self.fake.alive())
    @rule(lives=st.booleans())
    def refuse(self, lives: bool) -> None:
        """A rank that refuses its input ends as if all were well."""
        job = self._one()
        number = next(key for key, item in self.fake.jobs.items() if item is job)
        (job.folder / f"{number}_0_result.pkl").write_bytes(pickle.dumps(("success", "x: is impossible; use y")))
        if not lives:
            job.status = Status("ended", "COMPLETED")

    @precondition(lambda self: self.fake.alive())
    @rule(state=st.sampled_from(["NODE_FAIL", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY", "CANCELLED by 0", "COMPLETED"]))
    def end(self, state: str) -> None:
        self._one().status = Status("ended", state)

    @precondition(lambda self: self.fake.alive())
    @rule()
    def vanish(self) -> None:
        self._one().status = Status("absent")

    @rule()
    def new_cluster(self) -> None:
        """Every job is gone and its id belongs to a stranger."""
        self.fake.jobs = {key: replace(job, name="stranger") for key, job in self.fake.jobs.items()}

    @invariant()
    def one_job_at_most(self) -> None:
        assert len(self.fake.alive()) <= 1

    @invariant()
    def attempts_without_progress_are_bounded(self) -> None:
        entry = self.launcher.ledger.read("f")
        assert entry is not None
        barren = 0
        for attempt in entry.attempts:
            barren = 0 if attempt.progressed else barren + 1
        assert barren <= RETRIES + 1


Life.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
test_life = pytest.mark.filterwarnings("ignore")(Life.TestCase)


def test_the_machine_notices_a_second_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a rule that resubmits what it cannot see breaks the invariant."""
    real = ledger.decide

    def careless(attempts: list[Attempt], sight: Sight, retries: int) -> Decision:
        decision = real(attempts, sight, retries)
        return Decision("submit", "careless") if decision.act == "wait" else decision

    monkeypatch.setattr("mirepro.launch.launcher.decide", careless)
    monkeypatch.setattr(Fake, "cancel", lambda *_: None)
    machine = Life()
    machine.poll("")
    machine.one_job_at_most()
    machine.poll("")
    with pytest.raises(AssertionError):
        machine.one_job_at_most()


def test_the_machine_notices_attempts_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a rule that never stops breaks the bound; the real one, after the same ends, keeps it."""
    real = ledger.decide

    def tireless(attempts: list[Attempt], sight: Sight, retries: int) -> Decision:
        decision = real(attempts, sight, retries)
        return Decision("submit", decision.reason) if decision.act == "stop" else decision

    def live() -> Life:
        machine = Life()
        for _ in range(RETRIES + 2):
            machine.poll("")
            for job in machine.fake.alive():  # none where it was given up
                job.status = Status("ended", "NODE_FAIL")
            machine.attempts_without_progress_are_bounded()
        return machine

    live().folder.cleanup()
    monkeypatch.setattr("mirepro.launch.launcher.decide", tireless)
    with pytest.raises(AssertionError, match=rf"assert {RETRIES + 2} <= "):
        live()


def test_the_machine_notices_a_submission_though_the_result_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a rule that does not look at the result; the real one collects it."""
    real = ledger.decide

    def blind(attempts: list[Attempt], sight: Sight, retries: int) -> Decision:
        return real(attempts, replace(sight, finished=False, settled=True), retries)

    def live() -> Life:
        machine = Life()
        machine.poll("")
        machine.finish()
        machine.poll("")
        return machine

    live().folder.cleanup()
    monkeypatch.setattr("mirepro.launch.launcher.decide", blind)
    with pytest.raises(AssertionError, match="submitted though the result stands"):
        live()


def attempt(reason: str = "", progressed: bool = False) -> Attempt:
    return Attempt("t", "f", "failed" if reason else "submitted", reason=reason, progressed=progressed)


GONE = Status("absent")
SAME = Failure("ValueError: a")


@pytest.mark.parametrize(
    ("attempts", "sight", "act", "reason"),
    [
        ([], Sight(), "submit", ""),
        ([attempt()], Sight(finished=True, failure=SAME), "collect", ""),
        ([attempt()], Sight(status=Status("running")), "wait", ""),
        ([attempt()], Sight(status=Status("unreachable"), settled=True), "wait", ""),
        ([attempt()], Sight(status=GONE), "wait", ""),
        ([attempt()], Sight(status=GONE, settled=True), "submit", "LOST"),
        ([attempt()], Sight(failure=SAME), "submit", "ValueError: a"),
        ([attempt()], Sight(failure=Failure("bad input", refused=True)), "stop", "bad input"),
        ([attempt("ValueError: a"), attempt()], Sight(failure=SAME), "stop", "twice the same way"),
        ([attempt("ValueError: b"), attempt()], Sight(failure=SAME), "submit", "ValueError: a"),
        ([attempt()], Sight(status=Status("ended", "CANCELLED by 7"), settled=True), "stop", "cancelled"),
        ([attempt("LOST: x")] * 3 + [attempt()], Sight(status=GONE, settled=True), "stop", "4 attempts"),
        ([attempt("LOST: x")] * 3 + [attempt()], Sight(status=GONE, settled=True, progressed=True), "submit", "LOST"),
        (
            [attempt("TIMEOUT, without a result", True)] * 9 + [attempt()],
            Sight(status=Status("ended", "TIMEOUT"), settled=True, progressed=True), "submit", "TIMEOUT",
        ),
        (
            [attempt("TIMEOUT, without a result"), attempt()],
            Sight(status=Status("ended", "TIMEOUT"), settled=True), "stop", "twice",
        ),
    ],
)  # fmt: skip
def test_decision(attempts: list[Attempt], sight: Sight, act: str, reason: str) -> None:
    decision = decide(attempts, sight, 3)
    assert decision.act == act
    assert reason in decision.reason


def test_two_heads_submit_once(tmp_path: Path) -> None:
    fake = Fake()
    barrier = threading.Barrier(2)

    def head() -> None:
        launcher, ticket = make(tmp_path, fake)
        barrier.wait()
        launcher.start(ticket).poll()

    heads = [threading.Thread(target=head) for _ in range(2)]
    for thread in heads:
        thread.start()
    for thread in heads:
        thread.join()
    assert fake.count == 1


def test_gone_job_gets_time_to_settle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(launcher_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    fake = Fake()
    launcher, ticket = make(tmp_path, fake, settle=20.0)
    handle = launcher.start(ticket)
    handle.poll()
    fake.jobs["1"].status = Status("absent")
    for seconds in (0.0, 19.9):
        now[0] += seconds
        handle.poll()
        assert fake.count == 1
    now[0] += 0.2
    handle.poll()
    assert fake.count == 2


def test_damaged_entry_is_one_line(tmp_path: Path) -> None:
    launcher, ticket = make(tmp_path, Fake())
    launcher.start(ticket)
    path = launcher.ledger.path("f")
    for text in ("{", '{"schema": "other"}', "[]"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"f\.json"):
            launcher.ledger.read("f")


def test_first_failed_rank_speaks(tmp_path: Path) -> None:
    for rank, text, age in ((0, "ConnectionError: peer", 1), (1, "ValueError: cause", 2)):
        path = tmp_path / f"7_{rank}_result.pkl"
        path.write_bytes(pickle.dumps(("error", text)))
        os.utime(path, (1000 - age, 1000 - age))
    failure = outcome(tmp_path, "7")
    assert failure is not None
    assert failure.reason == "ValueError: cause"
    assert outcome(tmp_path, "8") is None
