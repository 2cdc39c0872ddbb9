"""What ``patchpipe generate`` shows."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressDisplay
from rich.table import Table

from patchpipe.cli.figures import count, size
from patchpipe.cli.pairs import Comparison
from patchpipe.demo import MODEL_DIR

if TYPE_CHECKING:
    from patchpipe.engine import Engine, Progress, RankInfo, Result

_PROMPT_WIDTH = 40


class View:
    """A console that tells what happens.

    Args:
        quiet_stdout: Tell it on the standard error, because the standard output is for a report.
    """

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.console = Console(stderr=quiet_stdout, highlight=False)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner while the block runs."""
        with self.console.status(f"{text} …"):
            yield

    @contextlib.contextmanager
    def painting(self, prompt: str) -> Iterator[Callable[[Progress], None]]:
        """A progress bar while the block runs; gives what to call after each step."""
        with self.painting_together([prompt]) as on_progress:
            yield on_progress

    @contextlib.contextmanager
    def painting_together(self, prompts: Sequence[str]) -> Iterator[Callable[[Progress], None]]:
        """The same with a bar for each of several pictures that are painted at once."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with ProgressDisplay(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as display:
            tasks = [display.add_task(escape(_shorten(prompt)), total=None) for prompt in prompts]

            def on_progress(progress: Progress) -> None:
                display.update(tasks[progress.call], completed=progress.step, total=progress.total)

            yield on_progress

    def header(self, engine: Engine, model: str) -> None:
        """The model, the layout and the ranks."""
        first = engine.ranks[0]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        table.add_row("model", f"[bold]{escape(_model_name(model))}[/]")
        table.add_row("pipeline", f"{first.pipeline_class} · {first.transformer_class} · {first.dtype}")
        layout = "plain diffusers, one device" if engine.config is None else engine.config.describe()
        table.add_row("layout", f"[bold]{escape(layout)}[/]")
        if engine.layout_reason is not None:
            table.add_row("", escape(f"{engine.layout_reason}"))
        for rank in engine.ranks:
            table.add_row(f"rank {rank.rank}", _describe_rank(rank))
        table.add_row("start-up", f"{engine.start_seconds:.1f} s")
        self.console.print(table)
        self.console.print()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Shows what the workers warn of while the block runs."""
        handler, logger = _Notes(self.console), logging.getLogger("patchpipe")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def painted(self, prompt: str, seed: int, result: Result) -> None:
        """One line for a finished picture."""
        details = [f"seed {seed}", *_describe_stats(result.stats)]
        line = f"[green]✓[/] {escape(_shorten(prompt))}  [bold]{result.seconds:.2f} s[/]"
        self.console.print(f"{line}  [dim]{' · '.join(details)}[/]")

    def together(self, pictures: int, seconds: float) -> None:
        """How long several pictures in flight took."""
        if pictures > 1:
            self.console.print(f"  [dim]{pictures} in flight together, {seconds / pictures:.2f} s a picture[/]")

    def comparison(self, comparison: Comparison) -> None:
        """Times, speed-up and likeness of every pair."""
        title = f"{comparison.devices} against 1, {comparison.threads} CPU threads each"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
        table.add_column("prompt", overflow="ellipsis", no_wrap=True)
        for name in ("1 device", _devices(comparison.devices), "speed-up", "PSNR"):
            table.add_column(name, justify="right", no_wrap=True)
        for pair in comparison.pairs:
            one, many = statistics.median(pair.one_seconds), statistics.median(pair.many_seconds)
            times = (f"{one:.2f} s", f"{many:.2f} s", f"{pair.speed_up:.2f}×")
            table.add_row(escape(_shorten(pair.prompt)), *times, likeness(pair.psnr))
        self.console.print(table)
        details = " · ".join(_describe_stats(comparison.pairs[-1].stats))
        self.console.print(f"median speed-up [bold]{comparison.speed_up:.2f}×[/]  [dim]{details}[/]")

    def written(self, files: list[Path], seconds: float) -> None:
        """Where the pictures are, and how long all of it took."""
        for file in files:
            self.console.print(f"[green]→[/] {escape(str(file))}", soft_wrap=True)
        self.console.print(f"[dim]{seconds:.1f} s in all, loading included[/]")


class _Notes(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._shown:
            self._shown.add(text)
            self._console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


def _devices(number: int) -> str:
    return f"{number} devices" if number > 1 else "patchpipe"


def _describe_rank(rank: RankInfo) -> str:
    threads = f"{rank.threads} thread{'s' if rank.threads > 1 else ''}"
    held = f"{count(rank.parameters)} of the transformer's parameters"
    return f"{rank.device} · {threads} · {held} · {size(rank.bytes)} of weights"


def _describe_stats(stats: Any) -> list[str]:
    if not stats:
        return []
    times, patches, drafts = (stats.get(name, 0) for name in ("materialisations", "patches", "drafts"))
    calls = f"{stats.get('steps_synchronous', 0)} synchronous and {stats.get('steps_patched', 0)} patched calls"
    return [
        f"{patches} patch{'es' if patches != 1 else ''}",
        f"{calls}, {drafts} draft{'s' if drafts > 1 else ''}" if drafts else calls,
        f"materialised {'once' if times == 1 else f'{times} times'}",
    ]


def likeness(decibels: float) -> str:
    """How alike two pictures are, in words."""
    return "identical" if math.isinf(decibels) else f"{decibels:.1f} dB"


def _model_name(model: str) -> str:
    return "the bundled model" if Path(model) == MODEL_DIR else model


def _shorten(text: str) -> str:
    return text if len(text) <= _PROMPT_WIDTH else text[: _PROMPT_WIDTH - 1] + "…"
