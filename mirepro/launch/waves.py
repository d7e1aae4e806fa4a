"""Parallel reproduction: each stage is a `dvc repro --single-item` of its own, started as soon as its inputs stand."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mirepro import determinism, files, stages
from mirepro.errors import UserError
from mirepro.launch.board import Board
from mirepro.launch.nursery import Nursery
from mirepro.launch.plan import Pipeline, Plan, is_code
from mirepro.profiles import Profile

POLL = 0.1  # seconds between looks at the running stages
TAIL = 25  # lines of a failed stage's log
DEFAULT = 10.0  # seconds, where no stage of a kind ever ran


class StageFailed(Exception):
    """A stage failed; the message holds its name and the tail of its log."""


@dataclass
class Running:
    """A started stage: first its computation, where it has one, then DVC, which collects it."""

    name: str
    worker: BaseProcess | None
    collect: Callable[[], "subprocess.Popen[bytes]"]
    log: Path
    progress: Path
    process: "subprocess.Popen[bytes] | None" = None
    started: float = field(default_factory=time.monotonic)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.process is None:
            if self.worker is not None and self.worker.exitcode != 0:
                return self.worker.exitcode
            self.process = self.collect()
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Sends a signal to the process group."""
        alive = self.worker if self.process is None else self.process
        if alive is not None and alive.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(alive.pid, number)

    def alive(self) -> bool:
        """Whether a process of the stage is at work."""
        if self.process is None:
            return self.worker is not None and self.worker.exitcode is None
        return self.process.poll() is None

    def latest(self) -> str:
        """What the stage last said about its progress."""
        try:
            return self.progress.read_text(encoding="utf-8").strip()
        except OSError:
            return ""


class Launcher:
    """Starts stages of one profile as processes of their own.

    Args:
        profile: Whose tier and threads the environment gets.
        lock: Descriptor that children inherit, so that a lock outlives a killed head.
    """

    def __init__(self, profile: Profile, lock: int) -> None:
        self._root, self._lock = profile.root, lock
        tier = determinism.environment(profile.tier, profile.threads)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        self._environment = os.environ | tier | {"PATH": path, "DVC_NO_ANALYTICS": "1"}
        self._folder = profile.root / ".mirepro" / "logs"
        self._nursery = Nursery(profile, tier)

    def start(self, name: str) -> Running:
        """Starts a stage in a process group of its own; its output goes to `.mirepro/logs/`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        base = self._folder / name.replace("/", ".").replace(":", ".")
        log, progress = base.with_name(base.name + ".log"), base.with_name(base.name + ".progress")
        progress.unlink(missing_ok=True)
        log.write_bytes(b"")
        return Running(name, self._nursery.start(name, log, progress), partial(self._dvc, name, log), log, progress)

    def _dvc(self, name: str, log: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        with log.open("ab") as output:
            return subprocess.Popen(
                command, cwd=self._root, env=self._environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=(self._lock,),
            )  # fmt: skip


def repro(profile: Profile, targets: Sequence[str], jobs: int) -> int:
    """Reproduces targets and everything they need, several stages at a time.

    Args:
        profile: The profile that the targets belong to.
        targets: DVC targets; empty for the profile's whole pipeline.
        jobs: Stages at a time.

    Returns:
        The number of stages that ran, `code` apart.

    Raises:
        UserError: The pipeline or a target is wrong.
        StageFailed: A stage failed; those that ran beside it were allowed to finish.
        KeyboardInterrupt: Passed on to the running stages first.
    """
    if jobs < 1:
        raise UserError(f"--jobs: {jobs} is impossible; use 1 or more")
    with alone(profile.root) as lock, _terminable():
        pipeline = Pipeline(profile.root, targets or [profile.pipeline])
        launcher = Launcher(profile, lock)
        for name in filter(is_code, pipeline.needs):
            _wave(launcher, Plan({name: set()}, [name], {}), 1, Board({}, 1, quiet=True))
        plan = pipeline.plan()
        _wave(launcher, plan, jobs, Board(estimates(profile, plan.stale), jobs))
        return len(plan.stale)


def _wave(launcher: Launcher, plan: Plan, jobs: int, board: Board) -> None:
    """Runs the plan's stale stages; the longest remaining chain goes first."""
    waiting = dict.fromkeys(sorted(plan.stale, key=lambda name: -_ahead(plan, board.estimates)[name]))
    running: list[Running] = []
    failed: list[Running] = []
    with board:
        try:
            while running or (waiting and not failed):
                unfinished = waiting.keys() | {item.name for item in running}
                ready = [name for name in waiting if plan.needs[name].isdisjoint(unfinished)]
                for name in ready[: 0 if failed else jobs - len(running)]:
                    del waiting[name]
                    running.append(launcher.start(name))
                board.show([(item.name, item.started, item.latest()) for item in running])
                time.sleep(POLL)
                for item, code in [(item, code) for item in running if (code := item.poll()) is not None]:
                    running.remove(item)
                    good = code == 0
                    failed += [] if good else [item]
                    board.finish(item.name, time.monotonic() - item.started, good)
        except BaseException:
            _stop(running)
            raise
    if failed:
        raise StageFailed("\n".join(map(_complaint, failed)))


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
    lines = item.log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"{item.name} failed (exit {item.poll()}); {item.log} ends:", *lines[-TAIL:]])


def estimates(profile: Profile, names: Sequence[str]) -> dict[str, float]:
    """Seconds each stage is expected to take: its own last run, else the mean of its kind."""
    own: dict[str, float] = {}
    kinds: dict[str, list[float]] = {}
    for path in stages.provenance(profile).glob("*.json"):
        record: dict[str, Any] = files.read_json(path)
        own[record["stage"]] = record["seconds"]
        kinds.setdefault(record["stage"].partition("@")[0], []).append(record["seconds"])
    result = {}
    for name in names:
        stage = name.rpartition(":")[2]
        kind = kinds.get(stage.partition("@")[0], [])
        result[name] = own.get(stage, sum(kind) / len(kind) if kind else DEFAULT)
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
    """A polite kill ends like Ctrl-C, so that no stage is left behind."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
