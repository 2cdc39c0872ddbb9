"""One device against several on this machine: one thread a rank, alternating in one run.

python -m bench.loopback --shape flux-wide --method plain --method pipefusion --method ulysses
"""

from __future__ import annotations

from statistics import median
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bench.contenders import BESIDE, NOT_OURS, OURS, PLAIN, THEIRS, as_options, known
from bench.rounds import Row, bound, load, rows_of, save, take_turns, with_earlier
from bench.shapes import SHAPES, STEPS
from tests.support.ranks import run_ranks


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Processes of one thread.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="A contender; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the earlier rows of contenders not asked for.")] = False,
) -> None:
    """Measures, prints a table and writes bench/results."""
    theirs = [THEIRS] if shape.startswith("flux") else []  # the other classes have no plan of diffusers' own for it
    names = list(dict.fromkeys([PLAIN, BESIDE, *known(method or [*OURS, *theirs])]))  # each once
    rows = rows_of(run_ranks(ranks, take_turns, shape, names, rounds, steps, timeout=3600))
    limit = bound(steps, ranks)
    show(f"{shape}, {steps} steps, {ranks} ranks of one thread", rows, limit)
    command = f"python -m bench.loopback --shape {shape} --rounds {rounds}{as_options(method)}"
    figures = {"shape": shape, "ranks": ranks, "steps": steps, "bound": limit, "rows": [row.as_dict() for row in rows]}
    name = f"loopback-{shape}-{ranks}"
    if keep:
        command, figures = with_earlier(load(name), command + " --keep", figures)
    save(name, command, figures)


def show(title: str, rows: list[Row], limit: float) -> None:
    """A table for the terminal; what was waited and sent is given for each rank."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("method", no_wrap=True)
    for name in ("M", "seconds", "speed-up (spread)", "of bound", "waited s", "sent GB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        counted = row.name not in NOT_OURS
        share = f"{row.speedup / limit:.1%}" if row.name.startswith("pipefusion") else ""
        table.add_row(
            row.name, str(row.patches), f"{median(row.seconds):.1f}",
            f"{row.speedup:.2f}× ({min(row.ratios):.2f}-{max(row.ratios):.2f})", share,
            " ".join(f"{seconds:.1f}" for seconds in row.waited) if counted else "",
            " ".join(f"{size / 1e9:.2f}" for size in row.sent_bytes) if counted else "",
        )  # fmt: skip
    console = Console()
    console.print(f"{title}; the bound of PipeFusion is S/(1+(S-1)/N) = {limit:.2f}×")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
