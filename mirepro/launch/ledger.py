"""The ledger of jobs: one file per fingerprint, and the rule that says what to do next. No scheduler is called here."""

import dataclasses
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock

from mirepro import files
from mirepro.errors import UserError

SCHEMA = "mirepro.job/1"
EXTERNAL = frozenset({"NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "REVOKED", "LOST"})
"""Ends that are no fault of the job; they are bounded by the number of attempts only."""

Phase = Literal["queued", "running", "ended", "absent", "unreachable"]
State = Literal["submitting", "submitted", "finished", "failed", "cancelled"]


@dataclass(frozen=True)
class Status:
    """What a scheduler says about a job.

    Attributes:
        phase: `absent`: it knows no such job; `unreachable`: it does not answer.
        state: Its own word, for example NODE_FAIL.
        node: Where the job runs or ran.
        detail: Why it waits, or its exit code.
    """

    phase: Phase
    state: str = ""
    node: str = ""
    detail: str = ""

    @property
    def alive(self) -> bool:
        """Whether the job may still bring a result."""
        return self.phase in ("queued", "running")


@dataclass(frozen=True)
class Failure:
    """What a job said when it failed.

    Attributes:
        reason: Its last line.
        refused: Whether it is bad input, which no repetition cures.
        trace: Its traceback; a refusal has none.
        rank: Which of its processes said so.
    """

    reason: str
    refused: bool = False
    trace: str = ""
    rank: int = 0


@dataclass(frozen=True)
class Attempt:
    """One submission.

    Attributes:
        token: Random; part of the job's name, so that a reused id is not taken for this job.
        folder: Of the job's log and pickles, relative to the root.
        state: `submitting` until the scheduler's answer is written down.
        cluster: Name of the cluster, or host and boot of a local job.
        job: The scheduler's id.
        submitted: Seconds since 1970.
        reason: Why it failed.
        stamp: Of the checkpoints that it found.
        progressed: Whether it left newer ones.
    """

    token: str
    folder: str
    state: State = "submitting"
    cluster: str = ""
    job: str = ""
    submitted: float = 0.0
    reason: str = ""
    stamp: str = ""
    progressed: bool = False

    @property
    def open(self) -> bool:
        """Whether its end is not known yet."""
        return self.state in ("submitting", "submitted")


@dataclass
class Entry:
    """All submissions for one fingerprint.

    Attributes:
        stopped: Why no further attempt is made; a new command starts anew.
        past: Attempts of earlier commands, newest last.
    """

    fingerprint: str
    stage: str
    site: str
    attempts: list[Attempt] = field(default_factory=list)
    stopped: str = ""
    past: list[Attempt] = field(default_factory=list)

    @property
    def last(self) -> Attempt | None:
        """The newest attempt of this command or its predecessors."""
        return self.attempts[-1] if self.attempts else None

    def change(self, **values: Any) -> Attempt:
        """Replaces fields of the newest attempt."""
        self.attempts[-1] = dataclasses.replace(self.attempts[-1], **values)
        return self.attempts[-1]

    def begin(self, folder: Path) -> Attempt:
        """Adds an attempt with a token and a folder of its own."""
        token = uuid.uuid4().hex[:8]
        self.attempts.append(Attempt(token, str(folder / token), submitted=time.time()))
        return self.attempts[-1]

    def renew(self) -> None:
        """Forgets the outcome of an earlier command, not its history."""
        self.past = [*self.past, *self.attempts][-10:]
        self.attempts, self.stopped = [], ""


@dataclass(frozen=True)
class Sight:
    """Everything known about an entry at one moment.

    Attributes:
        finished: The result stands in the work folder.
        failure: The newest attempt's own message, where it left one.
        status: What the scheduler says about the newest attempt.
        settled: It has been saying that the job is gone for longer than a result needs to appear.
        progressed: The newest attempt left a newer checkpoint than it found.
    """

    finished: bool = False
    failure: Failure | None = None
    status: Status = Status("absent")
    settled: bool = False
    progressed: bool = False


@dataclass(frozen=True)
class Decision:
    """What to do: collect the result, wait, submit (again), or stop with a reason."""

    act: Literal["collect", "wait", "submit", "stop"]
    reason: str = ""
    state: State = "failed"


def decide(attempts: Sequence[Attempt], sight: Sight, retries: int) -> Decision:
    """The next act: result first, then the scheduler, and only then another submission.

    Args:
        attempts: Submissions so far; the newest is open, unless the list is empty.
        sight: What is known now.
        retries: Further attempts allowed since the last progress.
    """
    if sight.finished:
        return Decision("collect", state="finished")
    if not attempts:
        return Decision("submit")
    if sight.failure is not None:
        if sight.failure.refused:
            return Decision("stop", sight.failure.reason)
        return _again(attempts, sight, sight.failure.reason, retries)
    status = sight.status
    if status.alive or status.phase == "unreachable" or not sight.settled:
        return Decision("wait")
    if status.state.startswith("CANCELLED"):
        return Decision("stop", f"the job was cancelled ({status.state})", "cancelled")
    lost = "LOST: the scheduler knows no such job and it left no result"
    end = " ".join(filter(None, (status.state, status.detail)))
    reason = lost if status.phase == "absent" else f"{end}, without a result"
    return _again(attempts, sight, reason, retries)


def _again(attempts: Sequence[Attempt], sight: Sight, reason: str, retries: int) -> Decision:
    """Another attempt, unless this one failed like an earlier one or too many brought nothing."""
    external = re.split("[:, ]", reason)[0] in EXTERNAL
    timeout = reason.startswith("TIMEOUT")
    before = [attempt.reason for attempt in attempts[:-1]]
    if not external and reason in before and not (timeout and sight.progressed):
        return Decision("stop", f"{reason} (twice the same way)")
    barren = 0 if sight.progressed else 1
    for attempt in reversed(attempts[:-1]):
        if not barren or attempt.progressed:
            break
        barren += 1
    if barren > retries:
        return Decision("stop", f"{reason} ({barren} attempts without progress)")
    return Decision("submit", reason)


class Ledger:
    """The files `.mirepro/jobs/<fingerprint>.json`.

    Args:
        root: The repository's root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".mirepro" / "jobs"

    def path(self, fingerprint: str) -> Path:
        """The file of a fingerprint."""
        return self.folder / f"{fingerprint}.json"

    @contextmanager
    def locked(self, fingerprint: str, stage: str = "", site: str = "") -> Iterator[Entry]:
        """An entry that no other process can change meanwhile; `save` keeps what was changed.

        Raises:
            UserError: The folder cannot be written, or the file is damaged.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{fingerprint}.lock"):
                entry = self.read(fingerprint) or Entry(fingerprint, stage, site)
                yield entry
        except OSError as error:
            raise files.refusal(Path(error.filename or self.folder), error) from error

    def read(self, fingerprint: str) -> Entry | None:
        """An entry as it stands, None where there is none.

        Raises:
            UserError: The file is damaged.
        """
        path = self.path(fingerprint)
        if not path.is_file():
            return None
        values = files.read_json(path)
        try:
            if values.pop("schema") != SCHEMA:
                raise ValueError
            for key in ("attempts", "past"):
                values[key] = [Attempt(**attempt) for attempt in values[key]]
            return Entry(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged entry; cancel its jobs by hand (squeue) and delete the file") from error

    def save(self, entry: Entry) -> None:
        """Writes an entry; call it inside `locked`."""
        files.write_json(self.path(entry.fingerprint), {"schema": SCHEMA} | dataclasses.asdict(entry))

    def entries(self, complain: Callable[[UserError], None]) -> list[Entry]:
        """All entries, the oldest submission first.

        Args:
            complain: Hears of a damaged one, which is left out.
        """
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                found.append(self.read(path.stem))
            except UserError as error:
                complain(error)
        newest = {e.fingerprint: max((a.submitted for a in [*e.past, *e.attempts]), default=0.0) for e in found if e}
        return sorted((entry for entry in found if entry), key=lambda entry: newest[entry.fingerprint])
