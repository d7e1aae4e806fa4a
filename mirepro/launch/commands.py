"""The commands `mirepro jobs` and `mirepro launch`."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from mirepro import profiles
from mirepro.errors import UserError
from mirepro.launch.launcher import Launcher, label, logs_of, name
from mirepro.launch.ledger import Attempt, Entry, Ledger, Status
from mirepro.launch.scheduler import Lost, Unreachable
from mirepro.params import PretrainParams

jobs_app = typer.Typer(no_args_is_help=True, help="List, follow, cancel and forget the jobs of stages.")
launch_app = typer.Typer(no_args_is_help=True, help="Check a place to run stages.")

BY_HAND = "cancelled by `mirepro jobs cancel`"
CUT = "being submitted, or cut short there; the same command or `mirepro jobs cancel` finds the job, where there is one"
Ids = Annotated[list[str], typer.Argument(help="job ids, stages, or beginnings of fingerprints")]


@dataclass(frozen=True)
class Known:
    """An entry of the ledger with the launcher of its site."""

    entry: Entry
    attempt: Attempt
    launcher: Launcher

    @property
    def status(self) -> Status:
        """What is known about the newest attempt; of a closed one the ledger's own word."""
        if not self.attempt.open:
            return Status("ended", self.attempt.state.upper(), detail=self.attempt.reason)
        return self._asked

    @property
    def over(self) -> bool:
        """Whether nothing of the job is at work: its result stands a moment before its last processes end."""
        phase = self._asked.phase
        return phase in ("ended", "absent") or (phase == "unreachable" and not self.attempt.open)

    @property
    def _asked(self) -> Status:
        """What the scheduler says about the newest attempt."""
        if self.attempt.state == "submitting":
            return Status("unreachable", "SUBMITTING", detail=CUT)
        try:
            return self.launcher.scheduler.status(self.attempt, name(self.entry.stage, self.attempt))
        except (Unreachable, UserError) as error:
            return Status("unreachable", detail=str(error))

    @property
    def logs(self) -> list[Path]:
        """The newest attempt's logs, the one to read first in front."""
        return logs_of(self.launcher.root / self.attempt.folder, self.attempt.job)


def known(root: Path) -> list[Known]:
    """All entries that ever had a job; launchers are shared per site."""
    launchers: dict[str, Launcher] = {}
    found = []
    for entry in Ledger(root).entries(lambda error: print(f"mirepro: {error}", file=sys.stderr)):
        attempts = [*entry.past, *entry.attempts]
        if attempts:
            if entry.site not in launchers:
                launchers[entry.site] = _launcher(root, entry.site)
            found.append(Known(entry, attempts[-1], launchers[entry.site]))
    return found


def _launcher(root: Path, place: str) -> Launcher:
    """A site's launcher; one that reaches nothing where the site's file is gone or wrong."""
    from mirepro import site, stages

    try:
        return Launcher(root, site.load(root, place, stages.JOBS))
    except UserError as error:
        return Launcher(root, site.Site(place), Lost(str(error)))


def select(root: Path, ids: list[str]) -> list[Known]:
    """The entries that ids name.

    Raises:
        UserError: An id that fits no job.
    """
    items, chosen = known(root), []
    for wanted in ids:
        fits = [
            item for item in items
            if wanted in (label(item.attempt.job), item.entry.stage)
            or (len(wanted) >= 6 and item.entry.fingerprint.startswith(wanted))
        ]  # fmt: skip
        if not fits:
            raise UserError(f"job {wanted!r}: not in the ledger; `mirepro jobs list` shows all")
        chosen.append(max(fits, key=lambda item: item.attempt.submitted))  # ids and stages come again
    return chosen


@jobs_app.command("list")
def list_jobs() -> None:
    """Show every job of the ledger and what the scheduler says about it."""
    rows = [("JOB", "STAGE", "SITE", "STATE", "NODE", "SUBMITTED", "ATTEMPTS", "REASON")]
    for item in known(profiles.find_root()):
        status, entry = item.status, item.entry
        state = status.state or status.phase.upper()
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(item.attempt.submitted))
        reason = entry.stopped or status.detail
        count = str(len(entry.attempts) or 1)
        rows.append((label(item.attempt.job), entry.stage, entry.site, state, status.node, when, count, reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


@jobs_app.command()
def logs(
    job: Annotated[str, typer.Argument(help="a job id, a stage, or the beginning of a fingerprint")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until the job ends")] = False,
) -> None:
    """Print the log of a job; of several ranks that of the first to fail, then rank 0's."""
    item = select(profiles.find_root(), [job])[0]
    if not follow and not item.logs[0].is_file():
        raise UserError(f"{item.logs[0]}: no log yet; the job is {item.status.state or item.status.phase}")
    shown: list[Path] = []
    while left := [log for log in item.logs if log not in shown]:  # a rank may fail while rank 0's log is followed
        if len(shown) + len(left) > 1:
            print(f"==> {left[0]} <==")
        for text in _lines(left[0], item, follow):
            print(text, end="", flush=True)
        shown.append(left[0])


def _lines(log: Path, item: Known, follow: bool) -> Iterator[str]:
    """A log's text as it grows; ends with the job."""
    position = 0
    while True:
        over = not follow or not item.status.alive
        if log.is_file():
            with log.open("rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            yield text.decode(errors="replace")
        if over:
            return
        time.sleep(1.0)


@jobs_app.command()
def cancel(ids: Ids) -> None:
    """Stop jobs; their work stays, so that the same command can go on later."""
    for item in select(profiles.find_root(), ids):
        launcher, entry = item.launcher, item.entry
        with launcher.ledger.locked(entry.fingerprint) as current:
            over = f"{label(item.attempt.job)} {entry.stage}: was over".lstrip()
            print(_cancel(launcher, current) or over)


def _cancel(launcher: Launcher, entry: Entry) -> str:
    """Stops the newest job of an entry and says so; empty where it was over."""
    try:
        launcher.adopt(entry, wait=True)
    except (UserError, Unreachable) as error:
        return f"{entry.stage}: not cancelled, whether its submission came to a job is not known ({error}); try again"
    last, note = entry.last, "cancelled"
    if last is None or not last.open:
        return ""
    try:
        launcher.scheduler.cancel(last, name(entry.stage, last))
    except (UserError, Unreachable) as error:
        note = f"given up, not stopped ({error})"
    entry.change(state="cancelled", reason=BY_HAND)
    entry.stopped = BY_HAND
    launcher.ledger.save(entry)
    return f"{label(last.job)} {entry.stage}: {note}"


@jobs_app.command()
def prune(
    days: Annotated[float, typer.Option(help="keep entries younger than this")] = 7.0,
    work: Annotated[bool, typer.Option("--work", help="also the work folders of stages that never finished")] = False,
) -> None:
    """Forget jobs that are over, with their logs."""
    root, count = profiles.find_root(), 0
    for item in known(root):
        ledger, mark = item.launcher.ledger, item.entry.fingerprint
        young = time.time() - item.attempt.submitted < 86400 * days
        if young or not item.over:
            continue
        with ledger.locked(mark):  # its file stays: who waits for it would hold another one than the next to come
            if ledger.read(mark) != item.entry:
                continue  # a command has submitted it again meanwhile
            shutil.rmtree(ledger.folder / mark, ignore_errors=True)
            ledger.path(mark).unlink(missing_ok=True)
            if work:
                shutil.rmtree(root / ".mirepro" / "work" / mark, ignore_errors=True)
            count += 1
    print(f"{count} entries removed")


@launch_app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="SITE", help="local, slurm, or a file of launch/")],
    profile: Annotated[str, typer.Option("--profile", help="whose threads and devices count")] = "desk",
) -> None:
    """Ask the cluster for every section of a site file, and run a short job of each."""
    from mirepro import site, stages
    from mirepro.launch.probe import probe

    os.environ[site.VARIABLE] = name
    root = profiles.find_root()
    chosen = profiles.load(root, profile)
    on_gpus = [kind for kind in stages.JOBS if (chosen.values.get(kind) or {}).get("device") == "cuda"]
    training = chosen.build(PretrainParams, "pretrain")
    shards = {"pretrain.shards": training.shards, "pretrain.bank_shards": training.bank_shards or training.shards}
    for line in probe(root, name, chosen.threads, on_gpus, shards):
        print(line, flush=True)
