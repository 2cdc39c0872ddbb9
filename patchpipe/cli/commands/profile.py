"""``patchpipe profile``: measures this machine for ``patchpipe plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from patchpipe.cli import options
from patchpipe.cli.figures import size
from patchpipe.files import check_new

if TYPE_CHECKING:
    from patchpipe.planner.machine.profiles import Profile

EPILOG = """
[bold]Examples[/]

  [green]patchpipe profile[/] -o mine.json

  Two ranks of one CPU thread:

  [green]patchpipe profile[/] --device cpu --ranks 2 --threads 1 -o cpu.json

  [green]patchpipe plan[/] --model flux.1-dev --devices 2 --profile mine.json
"""
Target = Annotated[Path, typer.Option("-o", "--output", help="File to write.", metavar="FILE")]
Kind = Annotated[
    str | None, typer.Option("--device", help="cpu or cuda. [dim]Default: GPUs if any.[/]", show_default=False)
]
Ranks = Annotated[
    int | None,
    typer.Option(
        "--ranks", help="Processes that exchange data. [dim]Default: one a GPU, 2 on a CPU.[/]", show_default=False
    ),
]

Map = Annotated[
    Path | None,
    typer.Option(
        "--map", help="Picture of the machine's ranks and links to write.", metavar="FILE", show_default=False
    ),
]


def profile(
    out: Target = Path("profile.json"),
    device: Kind = None,
    ranks: Ranks = None,
    threads: options.Threads = None,
    map: Map = None,
    force: options.Force = False,
    _debug: options.Debug = False,
) -> None:
    """Measure how fast this machine computes and how fast its ranks reach each other, in under a minute."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} must be cpu or cuda")
    if ranks is not None and ranks < 2:
        raise ValueError(f"--ranks {ranks} must be 2 or more: a link has two ends")
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be 1 or more")
    for file in (out, map):
        if file is not None:
            check_new(file, force)
    console, places = Console(highlight=False), _places(device, ranks)
    found = _measure(console, places, threads)
    found.save(out)
    console.print(_table(found, len(places)))
    if map is not None:
        from patchpipe.planner.machine.draw import draw_map  # heavy, and seldom asked for

        draw_map(found.device.name, found.link, len(places), map)
    for file in filter(None, (out, map)):
        console.print(f"[green]→[/] {escape(str(file))}", soft_wrap=True)


def _places(device: str | None, ranks: int | None) -> list[str]:
    """The device of every rank; a single GPU is joined to itself by nothing, so its ranks are the host's."""
    import torch

    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and not count:
        raise ValueError("--device cuda: this machine has no CUDA device; use --device cpu")
    if not count:
        return ["cpu"] * (ranks or 2)
    if ranks is not None and ranks > count:
        raise ValueError(f"--ranks {ranks} is more than the {count} CUDA devices of this machine")
    return [f"cuda:{index}" for index in range(ranks or count)]


def _measure(console: Console, places: list[str], threads: int | None) -> Profile:
    import torch

    from patchpipe.planner.machine.measure import TASKS_DEVICE, TASKS_LINK, measure_device, measure_link
    from patchpipe.planner.machine.profiles import Profile

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as display:
        task = display.add_task("measuring", total=TASKS_DEVICE + TASKS_LINK)
        progress = lambda done: display.update(task, advance=1, description=done)  # noqa: E731
        card = measure_device(torch.device(places[0]), len(places), threads, progress)
        ends = places if len(places) > 1 else ["cpu", "cpu"]
        return Profile(card, measure_link(ends, progress), "fp32" if places[0] == "cpu" else "bf16")


def _table(found: Profile, ranks: int) -> Table:
    from patchpipe.planner.machine.draw import told

    device, link = found.device, found.link
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "device", f"{escape(device.name)} · {size(device.memory)} · {device.bandwidth / 1e9:.1f} GB/s of memory"
    )
    table.add_row(
        "computes", f"{device.rate / 1e12:.3g} TFLOP/s in {found.dtype} · {device.launch * 1e6:.1f} µs an operation"
    )
    table.add_row("small products", f"lose the time of {device.fill:,.0f} output elements each")
    table.add_row("link", f"{link.name} · {link.bandwidth / 1e9:.2f} GB/s · {link.latency * 1e6:.0f} µs")
    table.add_row("domains", told(link, ranks))
    return table
