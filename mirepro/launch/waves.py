"""Parallel reproduction: each stage computes as soon as its inputs stand, and DVC collects results a few at a time."""

import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from mirepro import determinism, files, stages
from mirepro.errors import UserError
from mirepro.execution import KEEP
from mirepro.launch.board import Board
from mirepro.launch.collector import Parent
from mirepro.launch.dvc import mend
from mirepro.launch.launcher import POLITE, Detached, farewell, uninterrupted
from mirepro.launch.nursery import Nursery
from mirepro.launch.plan import Pipeline, Plan, is_code
from mirepro.launch.remote import Dispatch, Remote
from mirepro.launch.running import Running
from mirepro.profiles import Profile

POLL = 0.1  # seconds between looks at the running stages
IDLE = 0.5  # where a computation's end is all there is to wait for; it wakes at once
COLLECTORS = 2
"""DVC processes at a time; what is computed meanwhile goes to the next one together."""
TOGETHER = 4
"""Results that wait for each other while all slots compute: DVC takes a second to start, and a quarter for a result."""
PATIENCE = 60.0  # seconds that a result waits for others
TAIL = 25  # lines of a failed stage's log
SCARCE = 1 << 20  # bytes: with less room a failure may be the disk's
FIRST = {"pretrain": 15.0, "evaluate": 6.0, "detect": 60.0}
"""Seconds, where no stage of a kind ever ran: in what proportion they are, so that the longest do not come last."""
DEFAULT = 3.0  # seconds, likewise, for all other kinds


class StageFailed(Exception):
    """A stage failed; the message holds its name and the tail of its log."""


class Starter:
    """Starts stages of one profile as processes of their own, their computations where MIREPRO_LAUNCH says.

    Args:
        profile: Whose tier and threads the environment gets.
        lock: Descriptor that children inherit, so that a lock outlives a killed head.
    """

    def __init__(self, profile: Profile, lock: int) -> None:
        self._profile, self._root, self._lock = profile, profile.root, lock
        tier = determinism.environment(profile.tier, profile.threads)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment = os.environ | tier | {"PATH": path, "DVC_NO_ANALYTICS": "1", KEEP: "1"}
        self._folder = profile.root / ".mirepro" / "logs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._nursery = Dispatch.chosen(profile, tier) or Nursery(profile, tier)
        self._parent = self._prepare()

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *_: object) -> None:
        self._parent.close()

    def recorded(self, names: Iterable[str]) -> None:
        """Removes the work that was kept until DVC's record of these stages."""
        stages.recorded(self._profile, names)

    def start(self, name: str) -> Running:
        """Starts a stage in a process group of its own; its output goes to `.mirepro/logs/`."""
        base = self._folder / name.replace("/", ".").replace(":", ".")
        log, progress = base.with_name(base.name + ".log"), base.with_name(base.name + ".progress")
        progress.unlink(missing_ok=True)
        log.write_bytes(b"")
        return Running(name, self._nursery.start(name, log, progress), log, progress)

    def collect(self, items: Sequence[Running]) -> None:
        """Starts DVC for computed stages, or for one whose command does everything."""
        arguments = ["--wait-for-lock", "repro", "--single-item", *(item.name for item in items)]
        with uninterrupted(children=False):
            if not self._parent.alive:
                self._parent = self._prepare()
            process = self._parent.start(items[0].log, arguments)
            for item in items:
                item.process, item.mates = process, len(items)

    def _prepare(self) -> Parent:
        """The process that DVCs are forked from."""
        return Parent(self._root, self._environment, self._lock, self._folder / "dvc.log")


def repro(profile: Profile, targets: Sequence[str], jobs: int, keep_going: bool = False) -> int:
    """Reproduces targets and everything they need, several stages at a time.

    Args:
        profile: The profile that the targets belong to.
        targets: DVC targets; empty for the profile's whole pipeline.
        jobs: Stages at a time.
        keep_going: After a failure, run everything that does not need the failed stage.

    Returns:
        The number of stages that ran, `code` apart.

    Raises:
        UserError: The pipeline or a target is wrong.
        StageFailed: A stage failed; those that ran beside it were allowed to finish.
        Detached: Ctrl-C; jobs elsewhere go on.
        KeyboardInterrupt: Passed on to the running stages first.
    """
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} is impossible; use 1 or more")
    with alone(profile.root) as lock, _terminable():
        mend(profile.root, profile.pipeline)
        pipeline = Pipeline(profile.root, targets or [profile.pipeline])
        with Starter(profile, lock) as starter:
            for name in filter(is_code, pipeline.needs):
                Wave(starter, Plan({name: set()}, [name], {}), 1, Board({}, 1, quiet=True)).run()
            plan = pipeline.plan()
            starter.recorded(set(pipeline.needs) - set(plan.stale))
            Wave(starter, plan, jobs, Board(estimates(profile, plan.stale), jobs), keep_going).run()
            return len(plan.stale)


class Wave:
    """Runs a plan's stale stages; the longest remaining chain goes first.

    Args:
        starter: Starts a stage.
        plan: What to run.
        jobs: Stages at a time.
        board: Shows it.
        keep_going: After a failure, run everything that does not need the failed stage.
    """

    def __init__(self, starter: Starter, plan: Plan, jobs: int, board: Board, keep_going: bool = False) -> None:
        self._starter, self._plan, self._jobs, self._board, self._keep_going = starter, plan, jobs, board, keep_going
        ahead = _ahead(plan, board.estimates)
        self._waiting = dict.fromkeys(sorted(plan.stale, key=lambda name: -ahead[name]))
        self._running: list[Running] = []
        self._failed: list[Running] = []
        self._skipped: list[str] = []

    def run(self) -> None:
        """Runs everything; see `repro` for what it raises."""
        with self._board:
            try:
                while self._running or self._waiting:
                    self._start()
                    self._collect()
                    self._board.show([item.line() for item in self._running if not item.computed])
                    self._pause()
                    self._end()
            except BaseException as error:
                _stop(self._running)
                remote = [item.worker for item in self._running if isinstance(item.worker, Remote)]
                handles = [worker.handle for worker in remote if not worker.done]
                if handles and isinstance(error, KeyboardInterrupt):
                    raise Detached(farewell(handles)) from error
                raise
        if self._failed:
            skipped = [f"not run: {', '.join(self._skipped)}"] if self._skipped else []
            raise StageFailed("\n".join([*map(_complaint, self._failed), *skipped]))

    def _start(self) -> None:
        """Starts what is ready, as far as there is room."""
        unfinished = self._waiting.keys() | {item.name for item in self._running}
        ready = [name for name in self._waiting if self._plan.needs[name].isdisjoint(unfinished)]
        for name in ready[: self._jobs - self._busy]:
            del self._waiting[name]
            with uninterrupted(children=False):  # a process that has started is known, so that it can be stopped
                self._running.append(self._starter.start(name))

    @property
    def _busy(self) -> int:
        """Slots that are taken."""
        return sum(not item.frees for item in self._running)

    def _pause(self) -> None:
        """Until a computation of this machine ends, or for a moment."""
        computing = [item.sentinel for item in self._running]
        known = [sentinel for sentinel in computing if sentinel is not None]
        wait(known, IDLE if len(known) == self._jobs else POLL)
        for item in self._running:
            if item.ended is None and item.worker is not None and item.worker.exitcode is not None:
                item.ended = time.monotonic()

    def _collect(self) -> None:
        """Hands over what waits for DVC: at once where a slot is free, since a stage may need it, else some together.

        Stages whose command computes are not held up, nor kept waiting by others.
        """
        waiting = [item for item in self._running if item.computed]
        for item in [item for item in waiting if item.worker is None]:
            self._starter.collect([item])
        computed = [item for item in waiting if item.worker is not None]
        at_work = {item.process.pid for item in self._running if item.process is not None and item.worker is not None}
        waited = max((time.monotonic() - item.ended for item in computed if item.ended), default=0.0)
        enough = len(computed) >= TOGETHER or self._busy < self._jobs or waited > PATIENCE
        if computed and enough and len(at_work) < COLLECTORS:
            single = [item for item in computed if item.single]
            self._starter.collect(single[:1] or computed)

    def _end(self) -> None:
        """Takes leave of the stages that ended; a failure takes along what needs it, or all that waits."""
        for worker in [item.worker for item in self._running if isinstance(item.worker, Remote)]:
            while worker.news:
                self._board.tell(worker.news.pop(0))
        for item, code in [(item, code) for item in self._running if (code := item.poll()) is not None]:
            self._running.remove(item)
            self._board.finish(item.name, item.seconds, code == 0)
            if code == 0:
                self._starter.recorded([item.name])
            else:
                self._failed.append(item)
                gone = _needing(self._plan, item.name) if self._keep_going else set(self._waiting)
                self._skipped += [name for name in self._waiting if name in gone]
                self._waiting = {name: None for name in self._waiting if name not in gone}


def _needing(plan: Plan, name: str) -> set[str]:
    """All stages that need this one, through others too."""
    found = {name}
    for other in plan.stale:  # in an order that respects dependencies
        if not found.isdisjoint(plan.needs[other]):
            found.add(other)
    return found - {name}


def _ahead(plan: Plan, estimates: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the start of each stale stage to the end of the longest chain that waits for it."""
    result: dict[str, float] = {}
    for name in reversed(plan.stale):
        after = [result[other] for other in plan.stale if name in plan.needs[other] and other in result]
        result[name] = estimates.get(name, DEFAULT) + max(after, default=0.0)
    return result


def _stop(running: Sequence[Running]) -> None:
    """Interrupts the stages' process groups and waits: they write their checkpoints' last rename and end."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for item in running:
            item.signal(sign)
        end = time.monotonic() + 5
        while any(item.alive() for item in running) and time.monotonic() < end:
            time.sleep(POLL)


def _complaint(item: Running) -> str:
    lines = [line for line in item.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join([f"{item.name} failed (exit {item.poll()}); {item.log} ends:", *lines[-TAIL:], *_full(item.log)])


def _full(log: Path) -> list[str]:
    """What a log cannot say when there is no room for it."""
    free = shutil.disk_usage(log.parent).free
    told = f"{log.parent}: {free // 1024} KiB of the disk are free; free some disk space and run the command again"
    return [told] if free < SCARCE else []


def estimates(profile: Profile, names: Sequence[str]) -> dict[str, float]:
    """Seconds each stage is expected to take: its own last run, else the mean of its kind, else a guess."""
    own: dict[str, float] = {}
    kinds: dict[str, list[float]] = {}
    for path in stages.provenance(profile).glob("*.json"):
        record: dict[str, Any] = files.read_json(path)
        own[record["stage"]] = record["seconds"]
        kinds.setdefault(record["stage"].partition("@")[0], []).append(record["seconds"])
    result = {}
    for name in names:
        stage = name.rpartition(":")[2]
        kind = stage.partition("@")[0]
        known = kinds.get(kind, [FIRST.get(kind, DEFAULT)])
        result[name] = own.get(stage, sum(known) / len(known))
    return result


@contextmanager
def alone(root: Path) -> Iterator[int]:
    """Holds the repository's launcher lock; waits for the stages of a head that was killed or is still at work."""
    folder = root / ".mirepro"
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder / "waves.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise files.refusal(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for the running stages of another `mirepro repro` here", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill and a log-out end like Ctrl-C, so that no stage is left behind; `nohup` may ignore the latter."""

    def interrupt(number: int, frame: object) -> None:
        if number == signal.SIGHUP:  # shell and kernel both send it, and the second one must not disturb the end
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    heeded = [number for number in POLITE if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
