"""What ``patchpipe check`` shows: a bar while it works, then a table, and a plan to paste."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from patchpipe.checking.report import Report

MARKS = {"holds": "[green]holds[/]", "fails": "[bold red]fails[/]", "refused": "[yellow]refused[/]"}


class Show:
    """A console that tells what happens.

    Args:
        quiet_stdout: Tell it on the standard error, because the standard output is for a report.
    """

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.console, self._quiet = Console(stderr=quiet_stdout, highlight=False), quiet_stdout

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """A spinner while the block runs."""
        with self.console.status(f"{text} …"):
            yield

    @contextlib.contextmanager
    def progress(self, laws: int) -> Iterator[Callable[[str], None]]:
        """A bar while the block runs; gives what to call before each law."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as display:
            task, done = display.add_task("a tiny copy", total=laws), iter(range(laws + 1))

            def tell(name: str) -> None:
                display.update(task, description=escape(name), completed=next(done, laws))

            yield tell

    def report(self, report: Report) -> None:
        """The table, and the plan where one was proposed."""
        if self._quiet:
            return
        head = Table.grid(padding=(0, 2))
        head.add_column(style="dim")
        head.add_column(overflow="fold")
        head.add_row("class", f"[bold]{escape(report.kind)}[/]")
        head.add_row("tiny copy", escape(f"{report.blocks} blocks, {report.parameters / 1e6:.1f} M parameters"))
        head.add_row("called with", escape(report.told))
        head.add_row("plan", "proposed, below" if report.proposed else "patchpipe's own")
        self.console.print(head)
        table = Table("law", "", "", box=box.SIMPLE_HEAD)
        for finding in report.findings:
            table.add_row(finding.law, MARKS.get(finding.outcome, f"[dim]{finding.outcome}[/]"), escape(finding.detail))
        self.console.print(table)
        if report.proposed:
            self._proposal(report)

    def _proposal(self, report: Report) -> None:
        self.console.print("[bold]Proposed plan[/] [dim](docs/adding-a-model.md says where it goes)[/]\n")
        self.console.print(escape(report.proposed), soft_wrap=True)
        if report.unknown:
            self.console.print("[bold]What it could not tell[/]\n")
            for line in report.unknown:
                self.console.print(f"  · {escape(line)}", soft_wrap=True)
