"""Processes that compute stages, forked from one that has imported torch already: a stage starts in milliseconds.

DVC decides what is done with a result: it runs the stage's command, which finds the work finished and collects it.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path

from mirepro import progress, stages
from mirepro.errors import UserError
from mirepro.profiles import Profile

PRELOAD = [
    "mirepro.pretrain",
    "mirepro.transfer.evaluate",
    "mirepro.transfer.controls",
    "mirepro.transfer.detection",
    "scipy.optimize",  # the evaluation's solver, imported where it is used
]
INTERRUPTED = 130
MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 30), "MALLOC_MMAP_THRESHOLD_": str(1 << 25)}
"""Bytes (glibc): a process keeps a step's memory for the next one, which saves page faults."""


class Nursery:
    """Starts computations of one profile's stages.

    Args:
        profile: Whose stages.
        environment: The tier's variables; like those of the allocator they must stand before the fork server starts.
    """

    def __init__(self, profile: Profile, environment: Mapping[str, str]) -> None:
        os.environ.update(MEMORY | os.environ | dict(environment))
        self._root, self._name = profile.root, profile.name
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def start(self, address: str, log: Path, report: Path) -> BaseProcess | None:
        """Starts a stage's computation; None for a stage that computes nothing heavy.

        Args:
            address: DVC's address of the stage.
            log: File for its output.
            report: File for its progress.
        """
        kind, _, key = address.rpartition(":")[2].partition("@")
        if kind not in stages.JOBS:
            return None
        arguments = (self._root, self._name, kind, key or None, log, report)
        process = self._context.Process(target=compute, args=arguments, daemon=False)
        process.start()
        return process


def compute(root: Path, profile: str, kind: str, key: str | None, log: Path, report: Path) -> None:
    """Body of the process: its own group, its output in the log, one line for bad input."""
    os.setsid()
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ[progress.REPORT] = str(report)
    try:
        stages.prepare(root, profile, kind, key)
    except UserError as error:
        print(f"mirepro: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
