"""`mirepro launch check`: does the cluster take what the site file asks for, and does a short job come back?"""

import dataclasses
import os
import platform
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mirepro import files, ranks, site, stages
from mirepro.errors import UserError
from mirepro.launch import inquiry
from mirepro.launch.container import complaint
from mirepro.launch.launcher import create, label, outcome
from mirepro.launch.ledger import Attempt
from mirepro.launch.scheduler import Request, Scheduler, Unreachable
from mirepro.launch.slurm import Slurm
from mirepro.site import Section, Site

MINUTES = 1  # limit of the probe
GRACE = 1  # seconds; Slurm looks twice a minute, and with many more would signal a probe that has only begun
SOON = 300  # seconds that a probe of the real size may have to wait


class Probe:
    """What each task of the probe runs: writes down where it is, on the file system that jobs and this machine share.

    Args:
        folder: For its report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> None:
        node = os.environ.get("SLURMD_NODENAME", platform.node())
        files.write_json(self.folder / f"report-{ranks.identity()[0]}.json", {"node": node})


def probe(
    root: Path, name: str, threads: int = 1, on_gpus: Collection[str] = (), shards: Mapping[str, int] | None = None
) -> Iterator[str]:
    """Checks a site; yields a line for everything that is right.

    Args:
        root: The repository's root.
        name: The site's name.
        threads: Cores of a task, where a section names none.
        on_gpus: Classes of stages that compute on GPUs.
        shards: By their keys, the numbers that the ranks of a pretraining have to divide.

    Raises:
        UserError: The site file is wrong, the cluster refuses what it asks for, or the job does not come back.
    """
    place = site.load(root, name, stages.JOBS)
    for kind in on_gpus:
        if not place.section(kind).gpus:
            remedy = f"set gpus to the section's tasks ({place.section(kind).tasks}), or {kind}.device to cpu"
            raise UserError(f"{name}: gpus: {kind} asks for none, but {kind}.device is cuda in this profile; {remedy}")
    for key, number in (shards or {}).items():
        divides(place.section("pretrain"), key, number, name)
    scheduler = create(place)
    try:
        yield f"{name}: {place.executor} on {scheduler.cluster()}"
        groups: dict[str, list[str]] = {}
        for kind in stages.JOBS:
            groups.setdefault(repr(place.section(kind)), []).append(kind)
        checks = [Check(root, place, scheduler, kinds, threads) for kinds in groups.values()]
        if isinstance(scheduler, Slurm):
            for check in checks:  # all before the first probe, which may wait in the queue
                yield check.ask(scheduler)
        for check in checks:
            yield check.run()
    except Unreachable as error:
        raise UserError(f"{name}: the scheduler does not answer ({error}); try again later") from error


def tasks(section: Section) -> int:
    """All ranks of a job."""
    return section.tasks * section.nodes


def divides(section: Section, key: str, number: int, name: str) -> None:
    """Refuses a section whose ranks could not share a pretraining.

    Raises:
        UserError: The number of ranks does not divide the number of shards.
    """
    count = tasks(section)
    if number % count:
        several = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
        raise UserError(
            f"{name}: nodes, tasks: {count} ranks cannot share {key} {number} equally; ask for {several} of them"
        )


@dataclass(frozen=True)
class Check:
    """Of the classes of stages that share one section.

    Attributes:
        root: The repository's root.
        place: The site.
        scheduler: The site's.
        kinds: The classes.
        threads: Cores of a task, where the section names none.
    """

    root: Path
    place: Site
    scheduler: Scheduler
    kinds: list[str]
    threads: int

    @property
    def section(self) -> Section:
        """What the classes ask for."""
        return self.place.section(self.kinds[0])

    def ask(self, scheduler: Slurm) -> str:
        """What the cluster says to the section."""
        inquiry.partition(self.section, self.kinds[0])
        start = self._start(scheduler, self.section)
        return f"{', '.join(self.kinds)}: {shape(self.section)}: accepted{forecast(start)}"

    def run(self) -> str:
        """What came of a probe of the section's size, or of one task where that would have to wait."""
        section, note = dataclasses.replace(self.section, time=MINUTES, grace=GRACE), ""
        if isinstance(self.scheduler, Slurm) and tasks(section) > 1:
            start = self._start(self.scheduler, section)
            if start is not None and start - time.time() > SOON:
                note = f"; a smaller probe, because {shape(section)} would have to wait{forecast(start)}"
                section = dataclasses.replace(section, nodes=1, tasks=1, gpus=min(section.gpus, 1))
        return f"{', '.join(self.kinds)}: {self._submit(section)}{note}"

    def _start(self, scheduler: Slurm, section: Section) -> float | None:
        asked = dataclasses.replace(section, cpus=section.cpus or self.threads)  # for a refusal to name
        request = Request("check", self.root, self.root, Probe(self.root), asked, 0)
        return inquiry.start(scheduler, request, self.kinds[0])

    def _submit(self, section: Section) -> str:
        """Submits a probe, waits for its end, and says where it ran."""
        base = self.root / ".mirepro" / "jobs"
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="probe-", dir=base, ignore_cleanup_errors=True) as name:
            folder, title = Path(name), f"probe.{name[-8:]}"
            began = time.monotonic()
            job = self.scheduler.submit(Request(title, self.root, folder, Probe(folder), section, 0, self.threads))
            attempt = Attempt("", name, "submitted", self.scheduler.cluster(), job, time.time())
            try:
                self._wait(attempt, title, section)
                seconds = time.monotonic() - began
                while self.scheduler.status(attempt, title).alive:  # it still writes into the folder
                    time.sleep(0.5)
            except BaseException:
                self.scheduler.cancel(attempt, title)
                raise
            nodes = sorted({files.read_json(path)["node"] for path in _reports(folder)})
        what = _count(tasks(section), "task") + (" in the container" if section.image else "")
        return f"job {label(job)} ran on {', '.join(nodes)} ({what}), back in {seconds:.1f} s"

    def _wait(self, attempt: Attempt, title: str, section: Section) -> None:
        """Until every task has left its report.

        Raises:
            UserError: The job ended without.
        """
        folder, gone = Path(attempt.folder), 0.0
        while len(_reports(folder)) < tasks(section):
            time.sleep(0.5)
            failure = outcome(folder, attempt.job)
            if failure is not None:
                raise UserError(f"probe on {self.place.name}: {failure.reason}; is the package installed on the nodes?")
            status = self.scheduler.status(attempt, title)
            gone = gone or time.monotonic() if status.phase in ("ended", "absent") else 0.0
            if gone and time.monotonic() - gone > self.place.settle:
                seen = f"{status.state} {status.detail}".strip() or "gone"
                raise UserError(self._loss(folder, label(attempt.job), section, seen))

    def _loss(self, folder: Path, job: str, section: Section, seen: str) -> str:
        """Why a job has ended without all reports, as far as its log knows."""
        if said := complaint(section, folder, job):
            return f"{self.kinds[0]}.{said}"
        log = folder / f"{job}_0_log.out"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else ["no log"]
        last = [line for line in lines if not line.startswith("srun: ")][-1:]  # that tells of the end, not of the cause
        came = f"{len(_reports(folder))} of {tasks(section)} tasks came back"
        slow = "does a pull outlast the probe's minute? bring the image to the nodes before"
        remedy = slow if section.image else "do the nodes see this folder?"
        return f"probe on {self.place.name}: {seen}, {came} ({last}); {remedy}"


def _reports(folder: Path) -> list[Path]:
    return list(folder.glob("report-*.json"))


def shape(section: Section) -> str:
    """A section's size for people."""
    tasks = _count(section.tasks, "task") + (" each" if section.nodes > 1 else "")
    return f"{_count(section.nodes, 'node')}, {tasks}, {timedelta(minutes=section.minutes)}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def forecast(start: float | None) -> str:
    """When a job could start, for people; empty where nobody knows."""
    if start is None:
        return ""
    if start - time.time() < SOON:
        return f"; could start within {SOON // 60} minutes"
    return f"; could start at {time.strftime('%Y-%m-%d %H:%M', time.localtime(start))}"
