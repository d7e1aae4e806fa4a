"""What a reproduction shows: a live table on a terminal, one line per finished stage elsewhere."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(frozen=True)
class Line:
    """A running stage; the last three are of a job elsewhere."""

    stage: str
    started: float
    progress: str
    state: str = ""
    job: str = ""
    node: str = ""


class Board:
    """Counts finished stages and shows the running ones.

    Args:
        estimates: Expected seconds of each stage.
        jobs: Stages at a time.
        quiet: Show nothing.
    """

    def __init__(self, estimates: Mapping[str, float], jobs: int, quiet: bool = False) -> None:
        self.estimates = dict(estimates)
        self._left = dict(estimates)
        self._jobs, self._quiet, self._done = jobs, quiet, 0
        self._console = Console(stderr=True, highlight=False)
        self._start = time.monotonic()
        self._spent = self._expected = 0.0
        self._live = Live(console=self._console, transient=True, refresh_per_second=4, auto_refresh=False)
        self._shown = 0.0
        self._told: set[tuple[str, str]] = set()

    def __enter__(self) -> "Board":
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, running: Sequence[Line]) -> None:
        """Redraws the table of running stages, four times a second at most; elsewhere, says where a job goes."""
        now = time.monotonic()
        if self._live.is_started and now - self._shown > 0.25:
            self._shown = now
            self._live.update(self._table(running, now), refresh=True)
        if not self._live.is_started and not self._quiet:
            for line in running:
                if line.job and (line.stage, line.job) not in self._told:
                    self._told.add((line.stage, line.job))
                    self._console.print(f"{line.stage} is job {line.job}", markup=False, soft_wrap=True)

    def tell(self, note: str) -> None:
        """Says something about a running stage, above the table."""
        if not self._quiet:
            self._console.print(note, markup=False, soft_wrap=True)

    def finish(self, name: str, seconds: float, good: bool) -> None:
        """Counts a finished stage and says so."""
        self._done += 1
        self._spent += seconds
        self._expected += self._left.pop(name, 0.0)
        if not self._quiet:
            total = len(self.estimates)
            result = "done" if good else "FAILED"
            remaining = f"  about {clock(self.remaining())} left" if self._left and good else ""
            line = f"[{self._done:>{len(str(total))}}/{total}] {name} {result} in {seconds:.1f} s{remaining}"
            self._console.print(line, markup=False, soft_wrap=True)

    def remaining(self) -> float:
        """Seconds left, the estimates corrected by what the finished stages really took."""
        return self._factor() * sum(self._left.values()) / self._jobs

    def _table(self, running: Sequence[Line], now: float) -> Group:
        left = f", about {clock(self.remaining())} left" if self._left else ""
        title = f"{self._done} of {len(self.estimates)} stages, {clock(now - self._start)}{left}"
        table = Table(box=None, pad_edge=False)  # the title is as wide as the screen, not as the table
        elsewhere = any(line.job or line.state for line in running)
        for column in ("stage", *(("state", "job", "node") if elsewhere else ()), "time", "left", "progress"):
            table.add_column(column, no_wrap=True)
        for line in running:
            place = (line.state, line.job, line.node) if elsewhere else ()
            rest = self._left.get(line.stage, 0.0) * self._factor() - (now - line.started)
            left = clock(rest) if rest > 0 else ""
            table.add_row(line.stage, *place, clock(now - line.started), left, line.progress)
        return Group(Text(title), table)

    def _factor(self) -> float:
        """How much longer stages take than expected."""
        return self._spent / self._expected if self._expected else 1.0
