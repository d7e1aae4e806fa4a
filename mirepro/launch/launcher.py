"""Runs a stage's computation as a job: attach to the one that is there, submit, wait, submit again."""

import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mirepro.errors import UserError
from mirepro.launch.container import complaint
from mirepro.launch.ledger import Attempt, Decision, Entry, Failure, Ledger, Sight, Status, decide
from mirepro.launch.scheduler import Local, Request, Scheduler, Unreachable, pickled
from mirepro.launch.slurm import Slurm
from mirepro.launch.task import Task, stamp
from mirepro.site import Site

POLITE = (signal.SIGTERM, signal.SIGHUP)
"""What ends a command like Ctrl-C: a kill, and the end of its terminal or connection."""
FASTEST = 0.25  # seconds between the first looks
TAIL = 20  # lines of a traceback or a log below a message
ALONE = re.compile(r"rank \d+: lost the other ranks")  # see `mirepro.ranks`
HELD = re.compile("held|launch failed|BadConstraints|DependencyNeverSatisfied", re.IGNORECASE)
"""Slurm's reasons of jobs that wait until somebody acts."""


class JobFailed(Exception):
    """A stage's job failed for good; the message names the reason and the log, and what the job said stands below."""


class Detached(Exception):
    """The command ends, its jobs go on; the message says how to come back."""


@dataclass(frozen=True)
class Ticket:
    """A computation to launch.

    Attributes:
        stage: Its name, such as pretrain@ir-s0.
        kind: The class of stages that the site file has a section for.
        fingerprint: Everything the result depends on.
        work: Its work folder; `finished` in it is the result.
        call: Computes it there; picklable.
        threads: CPU threads it uses.
    """

    stage: str
    kind: str
    fingerprint: str
    work: Path
    call: Callable[[], None]
    threads: int

    @property
    def finished(self) -> bool:
        """Whether the result stands in the work folder."""
        try:
            return "finished" in os.listdir(self.work)  # a listing is fresh on shared file systems, a look-up is not
        except OSError:
            return False


class Launcher:
    """Jobs at one site.

    Args:
        root: The repository's root.
        site: Where the jobs run.
        scheduler: Takes them; by default the site's.
    """

    def __init__(self, root: Path, site: Site, scheduler: Scheduler | None = None) -> None:
        self.root, self.site = root, site
        self.scheduler = scheduler or create(site)
        self.ledger = Ledger(root)
        self._missed: dict[str, float] = {}

    def start(self, ticket: Ticket) -> "Handle":
        """Attaches to the job of an earlier command, or begins anew; see `Handle.poll`."""
        with self.ledger.locked(ticket.fingerprint, ticket.stage, self.site.name) as entry:
            if entry.last is None or not entry.last.open:
                entry.renew()
                entry.site = self.site.name
                self.ledger.save(entry)
        return Handle(self, ticket)

    def adopt(self, entry: Entry, wait: bool = False) -> None:
        """Finds the job of an attempt whose submission was cut short, or drops the attempt; call it in `locked`.

        It is dropped when nothing has been found for `settle` seconds: an sbatch outlives its head, and may be waiting
        for the controller just then.

        Args:
            entry: What the ledger says.
            wait: Whether to wait for that, instead of leaving it to a later call.

        Raises:
            Unreachable: The scheduler does not answer.
            UserError: It cannot be asked, or the job would be another cluster's.
        """
        last = entry.last
        if last is None or last.state != "submitting":
            return
        there, here = (place.partition(":")[0] for place in (last.cluster, self.scheduler.cluster()))
        if there not in ("", here):
            place = f"{entry.stage}: its submission to {there} was cut short, and this is {here}"
            raise UserError(f"{place}; run there, or delete {self.ledger.path(entry.fingerprint)} to give that job up")
        folder = self.root / last.folder
        while (job := self.scheduler.find(name(entry.stage, last), folder, last.submitted)) is None:
            missed = self._missed.setdefault(last.token, time.monotonic())
            if (left := missed + self.site.settle - time.monotonic()) <= 0:
                break
            if not wait:
                return
            time.sleep(min(left, 1.0))
        if job is None:
            entry.attempts.pop()
        else:
            pickled(folder, job)
            entry.change(state="submitted", job=job, cluster=self.scheduler.cluster())
        self.ledger.save(entry)

    def run(self, ticket: Ticket) -> None:
        """Launches a computation and waits for its result; says on stderr where it runs and why it runs again.

        Raises:
            JobFailed: It failed for good.
            Detached: Ctrl-C; the job goes on.
        """
        handle = self.start(ticket)
        pause, told = FASTEST, set[str]()
        try:
            while not handle.poll():
                _tell(handle, told)
                time.sleep(pause)
                pause = min(1.5 * pause, self.site.poll)
        except KeyboardInterrupt as interrupt:
            raise Detached(farewell([handle])) from interrupt


def create(site: Site) -> Scheduler:
    """The scheduler of a site."""
    return Slurm(site.poll / 2) if site.executor == "slurm" else Local()


def farewell(handles: list["Handle"]) -> str:
    """What Ctrl-C says about the jobs that go on."""
    jobs = [handle.label for handle in handles if handle.label]
    if not jobs:
        return "interrupted; nothing was submitted, the same command continues"
    named = f"job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)} continue{'' if len(jobs) > 1 else 's'}"
    return f"detached; {named}; rerun to re-attach, `mirepro jobs cancel {' '.join(jobs)}` to stop"


def _tell(handle: "Handle", told: set[str]) -> None:
    """Prints what is new about a launched computation."""
    where = [f"{handle.ticket.stage} is job {handle.label}"] if handle.label else []
    for line in [*handle.notes, *where]:
        if line not in told:
            told.add(line)
            print(line, file=sys.stderr, flush=True)


class Handle:
    """A launched computation, looked at from time to time.

    Attributes:
        status: What the scheduler said last.
        job: The scheduler's id of the newest attempt.
        notes: Why it was submitted again, or waits in vain, in the order of events; each names the job.
    """

    def __init__(self, launcher: Launcher, ticket: Ticket) -> None:
        self._launcher, self.ticket = launcher, ticket
        self.status = Status("queued")
        self.job, self._folder = "", Path()
        self.notes: list[str] = []
        self._gone: tuple[str, float] | None = None

    @property
    def label(self) -> str:
        """The job's id for people."""
        return label(self.job)

    @property
    def log(self) -> Path:
        """The newest attempt's log; of several ranks' that of the first to fail."""
        return logs_of(self._folder, self.job)[0]

    def poll(self) -> bool:
        """Looks once and acts; True when the result stands.

        Raises:
            JobFailed: The computation failed for good.
            UserError: The scheduler refuses the job, or the ledger cannot be written.
        """
        ledger, ticket = self._launcher.ledger, self.ticket
        with ledger.locked(ticket.fingerprint, ticket.stage, self._launcher.site.name) as entry:
            try:
                self._launcher.adopt(entry)
            except Unreachable as error:
                self.status = Status("unreachable", detail=str(error))
            self._show(entry)
            if entry.stopped:
                raise JobFailed(self._complaint(entry.stopped))
            if entry.last is not None and entry.last.state == "finished":
                return True
            try:
                sight = self._sight(entry.last)
                decision = decide(entry.attempts, sight, self._launcher.site.retries)
                self._act(entry, decision, sight)
            except Unreachable as error:
                self.status = Status("unreachable", detail=str(error))
                decision = Decision("wait")
        if decision.act == "stop":
            raise JobFailed(self._complaint(decision.reason))
        return decision.act == "collect"

    def _show(self, entry: Entry) -> None:
        last = entry.last
        if last is not None and last.job:
            self.job, self._folder = last.job, self._launcher.root / last.folder

    def _sight(self, last: Attempt | None) -> Sight:
        """Looks at the result, then at the job's own message, then at the scheduler."""
        if self.ticket.finished:
            return Sight(finished=True)
        if last is None:
            return Sight()
        if last.state == "submitting":
            return Sight(status=self.status)
        failure = outcome(self._launcher.root / last.folder, last.job)
        known = self._launcher.scheduler.status
        self.status = Status("ended", "FAILED") if failure else known(last, name(self.ticket.stage, last))
        self._remark()
        progressed = stamp(self.ticket.work) != last.stamp
        return Sight(False, failure, self.status, self._settled(last), progressed)

    def _remark(self) -> None:
        """Says once that a job waits for somebody's hand: nothing else would ever tell."""
        held, ways = self.status.detail, f"`scontrol release {self.label}` or `mirepro jobs cancel {self.label}`"
        note = f"{self.ticket.stage}: job {self.label} does not start by itself ({held}); cure the cause, then {ways}"
        if self.status.phase == "queued" and HELD.search(held) and note not in self.notes:
            self.notes.append(note)

    def _settled(self, last: Attempt) -> bool:
        """Whether the job has been gone for long enough."""
        if self.status.phase not in ("ended", "absent"):
            self._gone = None
            return False
        if self._gone is None or self._gone[0] != last.token:
            self._gone = (last.token, time.monotonic())
        return time.monotonic() - self._gone[1] >= self._launcher.site.settle

    def _act(self, entry: Entry, decision: Decision, sight: Sight) -> None:
        ledger = self._launcher.ledger
        if decision.act == "wait":
            return
        if entry.last is not None:
            if decision.act in ("submit", "stop"):  # of several ranks one may have failed and the rest wait for it
                self._launcher.scheduler.cancel(entry.last, name(entry.stage, entry.last))
            entry.change(state=decision.state, reason=decision.reason, progressed=sight.progressed)
        if decision.act == "stop":
            entry.stopped = decision.reason
        if decision.act == "submit":
            if decision.reason:
                self.notes.append(f"{self.ticket.stage}: job {self.label}: {decision.reason}; submitted again")
            self._submit(entry)
        ledger.save(entry)

    def _submit(self, entry: Entry) -> None:
        """Writes down that a job is to come, submits it, and writes its id down."""
        launcher, ticket = self._launcher, self.ticket
        section = launcher.site.section(ticket.kind)
        attempt = entry.begin(launcher.ledger.folder.relative_to(launcher.root) / ticket.fingerprint)
        entry.change(stamp=stamp(ticket.work), cluster=launcher.scheduler.cluster())
        launcher.ledger.save(entry)
        folder = launcher.root / attempt.folder
        folder.mkdir(parents=True, exist_ok=True)
        call = Task(ticket.call, ticket.work, 60.0 * section.minutes, section.grace)
        named, requeues = name(ticket.stage, attempt), launcher.site.requeues
        request = Request(named, launcher.root, folder, call, section, requeues, ticket.threads)
        with uninterrupted():
            try:
                entry.change(state="submitted", job=launcher.scheduler.submit(request))
            except UserError:
                entry.attempts.pop()
                raise
            finally:
                launcher.ledger.save(entry)
            self._show(entry)
        self.status = Status("queued")

    def _complaint(self, reason: str) -> str:
        """Reason and log in a line; below it the traceback of the rank that failed first, or the log where none did."""
        head = f"{self.ticket.stage}: job {self.label}"
        if not self.job:
            return f"{head}: {reason}"
        section, failure, log = self._launcher.site.section(self.ticket.kind), outcome(self._folder, self.job), self.log
        said = "; ".join(filter(None, (reason, complaint(section, self._folder, self.label))))
        whose = f"log of rank {failure.rank}" if failure and failure.rank else "log"
        below = failure.trace if failure else _text(log)
        return "\n".join([f"{head}: {said}; {whose}: {log}", *below.splitlines()[-TAIL:]])


@contextmanager
def uninterrupted(children: bool = True) -> Iterator[None]:
    """Holds Ctrl-C and what is `POLITE` back until the end, from children too: a submission ends in the ledger.

    The mask is what children inherit; the handlers hold back what another thread of this process receives meanwhile
    (they are the main thread's, the only one that Python interrupts).

    Args:
        children: Whether child processes inherit the mask; those that start a stage may not, for they outlast it.
    """
    held: list[int] = []
    polite = (signal.SIGINT, *POLITE)
    handled = polite if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in handled}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, polite if children else ())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for taken in held[:1]:
            signal.raise_signal(taken)


def name(stage: str, attempt: Attempt) -> str:
    """A job's name; the token tells it from a later job with a reused id."""
    return f"{stage}.{attempt.token}"


def label(job: str) -> str:
    """A job's id for people: of a local job the process number without its start time."""
    return job.partition(".")[0]


def outcome(folder: Path, job: str) -> Failure | None:
    """What a job's processes say about a failure, the first to fail first; None where none of them failed."""
    found = (_failure(path) for path in sorted(folder.glob(f"{label(job)}_*_result.pkl"), key=_age))
    return next(filter(None, found), None)


def logs_of(folder: Path, job: str) -> list[Path]:
    """The logs that tell of a job: of the rank that failed first, then of rank 0, which has the scheduler's words."""
    failure = outcome(folder, job)
    ranks = dict.fromkeys((failure.rank if failure else 0, 0))
    return [folder / f"{label(job)}_{rank}_log.out" for rank in ranks]


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _failure(path: Path) -> Failure | None:
    try:
        kind, value = pickle.loads(path.read_bytes())
    except (OSError, EOFError, pickle.UnpicklingError):
        return None
    rank = int(path.name.split("_")[-2])
    if kind == "success":
        # A rank that lost the others says only that: what became of them stands elsewhere, a requeue perhaps.
        return None if value is None or ALONE.match(str(value)) else Failure(str(value), True, rank=rank)
    lines = str(value).strip().splitlines()
    if lines and "['scontrol', 'requeue'" in lines[-1]:
        return None  # refused where Slurm is requeueing a preempted job already: the scheduler's word counts
    reason = re.sub("0x[0-9a-f]+", "0x", lines[-1] if lines else "unknown error")
    return Failure(reason, trace="\n".join(lines), rank=rank)
