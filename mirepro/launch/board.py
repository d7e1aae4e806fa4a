"""What a reproduction shows: a live table on a terminal, one line per finished stage elsewhere."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


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

    def __enter__(self) -> "Board":
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, running: Sequence[tuple[str, float, str]]) -> None:
        """Redraws the table of `(stage, start, progress)`, four times a second at most."""
        now = time.monotonic()
        if self._live.is_started and now - self._shown > 0.25:
            self._shown = now
            self._live.update(self._table(running, now), refresh=True)

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
        factor = self._spent / self._expected if self._expected else 1.0
        return factor * sum(self._left.values()) / self._jobs

    def _table(self, running: Sequence[tuple[str, float, str]], now: float) -> Table:
        left = f", about {clock(self.remaining())} left" if self._left else ""
        title = f"{self._done} of {len(self.estimates)} stages, {clock(now - self._start)}{left}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("stage", "time", "progress"):
            table.add_column(column, no_wrap=True)
        for name, started, progress in running:
            table.add_row(name, clock(now - started), progress)
        return table
