"""Live progress on a terminal, a line in a file for a launcher, silence elsewhere."""

import os
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

REPORT = "MIREPRO_PROGRESS"  # environment variable: the file a launcher reads
SECONDS = 1.0  # between two lines


class Bar:
    """One bar with rate, remaining time and the latest figures.

    Args:
        title: What is running.
        total: Number of units.
        done: Units finished before (a resumed run).
        unit: Name of a unit.
        shown: False keeps it silent everywhere.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "images", *, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._unit, self._done, self._total = unit, done, total
        self._report, self._reported = os.environ.get(REPORT) if shown else None, 0.0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task(title, total=total, completed=done, rate="", figures="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, amount: int, **figures: float | None) -> None:
        """Counts `amount` units and shows the figures that are not None."""
        text = "  ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None)
        speed = self._progress.tasks[0].speed
        rate = f"{speed:.0f} {self._unit}/s" if speed else ""
        self._progress.update(self._task, advance=amount, figures=text, rate=rate)
        self._done += amount
        if self._report and time.monotonic() - self._reported > SECONDS:
            self._reported = time.monotonic()
            Path(self._report).write_text(f"{self._done / max(1, self._total):.0%}  {text}", encoding="utf-8")
