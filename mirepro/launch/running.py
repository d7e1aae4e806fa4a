"""A stage at work in a parallel reproduction: its computation, then DVC, which collects the result."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mirepro.launch.board import Line
from mirepro.launch.collector import Collector
from mirepro.launch.remote import Remote


class Worker(Protocol):
    """A computation at work: a process of this machine, or a job elsewhere, which has no `pid`."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs."""

    @property
    def pid(self) -> int | None:
        """The leader of its process group."""


@dataclass
class Running:
    """A started stage: first its computation, where it has one, then DVC, which collects it.

    Attributes:
        process: DVC, which may collect other stages too.
        mates: The stages it collects.
        single: Whether DVC has failed for a group, so that this stage gets one of its own.
        ended: When its computation was seen to be over.
    """

    name: str
    worker: Worker | None
    log: Path
    progress: Path
    process: Collector | None = None
    mates: int = 1
    single: bool = False
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    @property
    def computed(self) -> bool:
        """Whether it waits for DVC."""
        return self.process is None and (self.worker is None or self.worker.exitcode == 0)

    @property
    def frees(self) -> bool:
        """Whether it takes no slot any more: its computation is over, and DVC's part is small."""
        return self.worker is not None and (self.process is not None or self.worker.exitcode == 0)

    @property
    def seconds(self) -> float:
        """How long it computed, or has been computing."""
        return (self.ended or time.monotonic()) - self.started

    @property
    def sentinel(self) -> int | None:
        """A descriptor that is ready when its computation ends; None for one that is over or elsewhere."""
        over = self.worker is None or self.process is not None or self.worker.exitcode is not None
        return None if over else getattr(self.worker, "sentinel", None)

    def poll(self) -> int | None:
        """The exit code, or None while it runs or waits."""
        if self.process is None:
            return None if self.worker is None else self.worker.exitcode or None
        code = self.process.poll()
        if code and self.mates > 1:  # whose fault it was is not known
            self.process, self.single = None, True
            return None
        return code

    def signal(self, number: int) -> None:
        """Sends a signal to the process group."""
        alive = self.worker if self.process is None else self.process
        if alive is not None and alive.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(alive.pid, number)

    def alive(self) -> bool:
        """Whether a process of the stage is at work here."""
        if self.process is None:
            here = self.worker is not None and not isinstance(self.worker, Remote)
            return here and self.worker.exitcode is None  # type: ignore[union-attr]
        return self.process.poll() is None

    def line(self) -> Line:
        """What the board shows."""
        if isinstance(self.worker, Remote):
            handle = self.worker.handle
            status, progress = handle.status, self.worker.progress
            word = "collecting" if self.process else " ".join(filter(None, (status.phase, status.detail)))
            return Line(self.name, self.started, _read(progress), word, handle.label, status.node)
        return Line(self.name, self.started, _read(self.progress))


def _read(progress: Path) -> str:
    """What a stage last said about its progress."""
    try:
        return progress.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
