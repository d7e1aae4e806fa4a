"""Computations of a parallel reproduction that run as jobs; the counterpart of the nursery."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from mirepro import stages
from mirepro.errors import UserError
from mirepro.launch import jobs
from mirepro.launch.launcher import FASTEST, Handle, JobFailed, Launcher
from mirepro.profiles import Profile


class Remote:
    """A launched computation that looks like a process.

    Attributes:
        handle: The launched computation.
        news: Notes of it that nobody has shown yet.
        pid: None: it has no process here.
    """

    pid = None

    def __init__(self, handle: Handle, log: Path, slowest: float) -> None:
        self.handle, self._log = handle, log
        self._slowest, self._pause, self._next, self._glance = slowest, FASTEST, 0.0, 0.0
        self._code: int | None = None
        self._told = 0
        self.news: list[str] = []

    @property
    def progress(self) -> Path:
        """Where the job says how far it is."""
        return self.handle.ticket.work / "progress"

    @property
    def done(self) -> bool:
        """Whether its end is known."""
        return self._code is not None

    @property
    def exitcode(self) -> int | None:
        """None while the job waits or runs; asks for its state less and less often, its result is seen at once."""
        now = time.monotonic()
        if self._code is None and now >= self._glance:
            self._glance = now + FASTEST
            if now >= self._next or self.handle.ticket.finished:
                self._pause = min(1.5 * self._pause, self._slowest)
                self._next = now + self._pause
                self._look()
        return self._code

    def _look(self) -> None:
        try:
            self._code = 0 if self.handle.poll() else None
        except (JobFailed, UserError) as error:
            self._code = 1
            _write(self._log, str(error))
        for note in self.handle.notes[self._told :]:
            _write(self._log, note)
            self.news.append(note)
        self._told = len(self.handle.notes)


class Refused:
    """A computation that could not be launched; it looks like a process that has failed."""

    exitcode, pid = 1, None


class Dispatch:
    """Launches computations of one profile's stages; see `Nursery`, which starts them here."""

    def __init__(self, profile: Profile, launcher: Launcher) -> None:
        self._profile, self._launcher = profile, launcher

    @classmethod
    def chosen(cls, profile: Profile, environment: Mapping[str, str]) -> "Dispatch | None":
        """Jobs where MIREPRO_LAUNCH says; None for `inline`.

        Args:
            profile: Whose stages.
            environment: The tier's variables, which jobs inherit.
        """
        launcher = jobs.chosen(profile.root)
        if launcher is None:
            return None
        os.environ.update(environment)
        return cls(profile, launcher)

    def start(self, address: str, log: Path, report: Path) -> Remote | Refused | None:
        """Launches a stage's computation; None for a stage that computes nothing heavy, or nothing new.

        Args:
            address: DVC's address of the stage.
            log: File for what happens to the job.
            report: Not used: the job writes its progress into its work folder.
        """
        kind, _, key = address.rpartition(":")[2].partition("@")
        if kind not in stages.JOBS:
            return None
        try:
            ticket = jobs.ticket(self._profile, kind, key or None)
            return None if ticket is None else Remote(self._launcher.start(ticket), log, self._launcher.site.poll)
        except UserError as error:  # of this stage alone: with --keep-going the others go on
            _write(log, str(error))
            return Refused()


def _write(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(f"mirepro: {text}\n")
