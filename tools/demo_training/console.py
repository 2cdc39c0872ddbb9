"""What the user sees: one console, progress with live figures, tables."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

CONSOLE = Console()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    grid = Table(*columns, title=title, title_justify="left")
    for row in rows:
        grid.add_row(*[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row])
    CONSOLE.print(grid)


class Meter:
    """A wall-clock progress bar with running figures, and a printed line every ``every`` seconds."""

    def __init__(self, title: str, seconds: float, every: float = 20.0, spent: float = 0.0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=CONSOLE, transient=True)
        self._task = self._bar.add_task(title, total=seconds, figures="")
        self._bar.update(self._task, completed=spent)
        self._every = every
        self._start = time.monotonic()
        self._printed = self._start

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the meter was made."""
        return time.monotonic() - self._start

    def update(self, done: float, figures: str) -> None:
        """Show how far the clock is and the latest figures."""
        self._bar.update(self._task, completed=done, figures=figures)
        now = time.monotonic()
        if now - self._printed >= self._every:
            self._printed = now
            CONSOLE.print(f"{now - self._start:7.0f} s  {figures}", highlight=False)


class Running:
    """An exponentially weighted mean, unbiased from the first value on."""

    def __init__(self, decay: float = 0.98) -> None:
        self._decay, self._sum, self._weight = decay, 0.0, 0.0

    def add(self, value: float) -> float:
        """Add a value and return the mean."""
        self._sum = self._decay * self._sum + (1 - self._decay) * value
        self._weight = self._decay * self._weight + (1 - self._decay)
        return self.mean

    @property
    def mean(self) -> float:
        """The mean so far."""
        return self._sum / self._weight if self._weight else float("nan")
