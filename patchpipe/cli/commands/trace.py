"""``patchpipe trace``: a recorded timeline as a picture, and how busy its ranks were."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.figures import size
from patchpipe.files import check_new, free_name
from patchpipe.tracing.busy import Busy, busy, steps_stretch
from patchpipe.tracing.draw import draw
from patchpipe.tracing.timeline import Timeline, read

EPILOG = """
[bold]Examples[/]

  [green]patchpipe generate[/] "red heart, flat style" --pipefusion 2 --trace run.json

  [green]patchpipe trace[/] run.json -o run.png

  Zoom in on three steps, as SVG:

  [green]patchpipe trace[/] run.json --steps 4-6 -o steps.svg
"""
LONGEST_WAITS = 3
TraceFile = Annotated[Path, typer.Argument(help="File that --trace wrote.", metavar="FILE")]
Drawing = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Picture to write. [dim]Default: FILE-timeline.png, or the next free number.[/]",
        show_default=False,
    ),
]
Steps = Annotated[
    str | None,
    typer.Option("--steps", help="Show these steps only.", metavar="FROM-TO", show_default=False),
]


def trace(
    file: TraceFile,
    out: Drawing = None,
    steps: Steps = None,
    force: options.Force = False,
    _debug: options.Debug = False,
) -> None:
    """Draw the timeline of a request, and tell how busy every rank was."""
    window = read_steps(steps)
    usual = file.with_name(f"{file.stem}-timeline.png")  # FILE.png may be the picture painted
    target = (out or (usual if force else free_name(usual))).expanduser()
    timeline = read(file)
    stretch = None if window is None else steps_stretch(timeline, *window)
    check_new(target, force)
    draw(timeline, target, window)
    console = Console(highlight=False)
    _show(console, timeline, busy(timeline, stretch), window)
    console.print(f"[green]→[/] {escape(str(target))}", soft_wrap=True)


def read_steps(text: str | None) -> tuple[int, int] | None:
    """Reads ``4-6``, or ``4`` alone.

    Raises:
        ValueError: It is neither.
    """
    if text is None:
        return None
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise ValueError(f"--steps {text} must be two steps, such as 4-6") from None


def _show(console: Console, timeline: Timeline, figures: tuple[Busy, ...], window: tuple[int, int] | None) -> None:
    about, (begin, end) = timeline.about, timeline.span_ns
    console.print(f"[bold]{escape(str(about.get('model', '')))}[/] · {escape(str(about.get('layout_text', '')))}")
    console.print(f"{about.get('steps')} steps · {about.get('patches')} patches · {(end - begin) / 1e9:.2f} s")
    if "error" in about:
        console.print(f"[red]failed:[/] {escape(str(about['error']))}", soft_wrap=True)
    console.print(_table(figures, window))


def _table(figures: tuple[Busy, ...], window: tuple[int, int] | None) -> Table:
    table = Table(title="Busy share", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    columns = ["rank", "stage", "steady", "request", "worked", "sent"]
    columns[2:2] = [] if window is None else [f"steps {window[0]}-{window[1]}"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("waited for", overflow="fold")
    for one in figures:
        chosen = [] if window is None else [_percent(one.chosen)]
        shares = (*chosen, _percent(one.steady), _percent(one.request))
        told = (f"{one.seconds:.2f} s", size(one.sent_bytes), _waits(one))
        table.add_row(str(one.rank), str(one.stage + 1), *shares, *told)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _waits(figures: Busy) -> str:
    longest = list(figures.waited.items())[:LONGEST_WAITS]
    return ", ".join(f"{channel} {seconds:.2f} s" for channel, seconds in longest if seconds >= 0.005)
