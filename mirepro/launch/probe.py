"""`mirepro launch check`: does the cluster know what the site file asks for, and does a short job come back?"""

import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mirepro import site, stages
from mirepro.errors import UserError
from mirepro.launch.launcher import create, outcome
from mirepro.launch.ledger import Attempt
from mirepro.launch.scheduler import Request, Scheduler, Unreachable
from mirepro.launch.slurm import command
from mirepro.site import Section, Site, parse_minutes

MINUTES = 1  # limit of the probe


class Probe:
    """What the probe runs: writes down where it is, and whether the package can be imported there.

    Args:
        report: File for its answer, on the file system that jobs and this machine share.
    """

    def __init__(self, report: Path) -> None:
        self.report = report

    def __call__(self) -> None:
        from mirepro import files

        facts = {"node": platform.node(), "python": platform.python_version(), "prefix": sys.prefix}
        files.write_json(self.report, facts)


def probe(root: Path, name: str) -> Iterator[str]:
    """Checks a site; yields a line for everything that is right.

    Raises:
        UserError: The site file is wrong, the cluster does not know what it names, or the job does not come back.
    """
    place = site.load(root, name, stages.JOBS)
    scheduler = create(place)
    try:
        yield f"{name}: {place.executor} on {scheduler.cluster()}"
        groups: dict[str, list[str]] = {}
        for kind in stages.JOBS:
            groups.setdefault(repr(place.section(kind)), []).append(kind)
        for kinds in groups.values():
            section = place.section(kinds[0])
            if place.executor == "slurm":
                _partition(section, kinds[0])
            yield _run(root, place, scheduler, kinds)
    except Unreachable as error:
        raise UserError(f"{name}: the scheduler does not answer ({error}); try again later") from error


def _partition(section: Section, kind: str) -> None:
    """Compares a section with the partition it names."""
    listing = {}
    for line in command("scontrol", "--oneliner", "show", "partition").splitlines():
        facts = dict(word.split("=", 1) for word in line.split() if "=" in word)
        listing[facts["PartitionName"]] = facts
    default = next((key for key, facts in listing.items() if facts.get("Default") == "YES"), None)
    wanted = section.partition or default
    if wanted is None:
        raise UserError(f"{kind}.partition: missing, and the cluster has no default; known: {', '.join(listing)}")
    for part in wanted.split(","):
        if part not in listing:
            raise UserError(f"{kind}.partition: {part!r} is unknown to the cluster; known: {', '.join(listing)}")
        facts = listing[part]
        if facts.get("State", "UP") != "UP":
            raise UserError(f"{kind}.partition: {part} is {facts['State']}; use another one")
        longest = facts.get("MaxTime", "UNLIMITED")
        if longest not in ("UNLIMITED", "INFINITE") and section.minutes > parse_minutes(longest):
            raise UserError(f"{kind}.time: {section.time} is over the limit {longest} of {part}; lower it")
        if section.nodes > int(facts.get("TotalNodes", section.nodes)):
            raise UserError(f"{kind}.nodes: {section.nodes}, and {part} has {facts['TotalNodes']}; lower it")


def _run(root: Path, place: Site, scheduler: Scheduler, kinds: list[str]) -> str:
    """Submits a probe with a section's resources and waits for it."""
    import dataclasses

    section = dataclasses.replace(place.section(kinds[0]), time=MINUTES, nodes=1, tasks=1, grace=30)
    base = root / ".mirepro" / "jobs"
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="probe-", dir=base, ignore_cleanup_errors=True) as folder:
        report, title = Path(folder) / "report.json", f"probe.{Path(folder).name[-8:]}"
        started = time.monotonic()
        job = scheduler.submit(Request(title, root, Path(folder), Probe(report), section, 0))
        attempt = Attempt("", folder, "submitted", scheduler.cluster(), job, time.time())
        try:
            _wait(place, scheduler, attempt, title, report)
            seconds = time.monotonic() - started
            while scheduler.status(attempt, title).alive:  # it still writes into the folder
                time.sleep(0.5)
        except BaseException:
            scheduler.cancel(attempt, title)
            raise
        node = re.search(r'"node": "([^"]*)"', report.read_text())
        where = node[1] if node else "?"
        return f"{', '.join(kinds)}: job {job.partition('.')[0]} ran on {where}, back in {seconds:.1f} s"


def _wait(place: Site, scheduler: Scheduler, attempt: Attempt, title: str, report: Path) -> None:
    """Until the report is there.

    Raises:
        UserError: The job ended without one.
    """
    gone = 0.0
    while not report.exists():
        time.sleep(0.5)
        failure = outcome(Path(attempt.folder), attempt.job)
        if failure is not None:
            raise UserError(f"probe on {place.name}: {failure.reason}; is the package installed on the nodes?")
        status = scheduler.status(attempt, title)
        gone = gone or time.monotonic() if status.phase in ("ended", "absent") else 0.0
        if gone and time.monotonic() - gone > place.settle:
            log = Path(attempt.folder) / f"{attempt.job.partition('.')[0]}_0_log.out"
            last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else ["no log"]
            seen = f"{status.state} {status.detail}".strip() or "gone"
            raise UserError(f"probe on {place.name}: {seen}, without a result ({last}); do the nodes see this folder?")
