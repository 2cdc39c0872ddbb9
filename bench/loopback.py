"""One device against several on this machine: one thread a rank, alternating in one run.

python -m bench.loopback --shape flux-wide --method plain --method pipefusion --method ulysses
"""

from __future__ import annotations

from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.contenders import BESIDE, OURS, PLAIN, THEIRS, as_options, known
from bench.rounds import Row, bound, rows_of, save, take_turns
from bench.shapes import SHAPES, STEPS
from tests.ranks import run_ranks


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Processes of one thread.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="A contender; may be given several times.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
) -> None:
    """Measures, prints a table and writes bench/results."""
    theirs = [THEIRS] if shape.startswith("flux") else []  # the other classes have no plan of diffusers' own for it
    names = list(dict.fromkeys([PLAIN, BESIDE, *known(method or [*OURS, *theirs])]))  # each once
    rows = rows_of(run_ranks(ranks, take_turns, shape, names, rounds, steps, timeout=3600))
    limit = bound(steps, ranks)
    show(f"{shape}, {steps} steps, {ranks} ranks of one thread", rows, limit)
    command = f"python -m bench.loopback --shape {shape} --rounds {rounds}{as_options(method)}"
    figures = {"shape": shape, "ranks": ranks, "steps": steps, "bound": limit, "rows": [row.as_dict() for row in rows]}
    save(f"loopback-{shape}-{ranks}", command, figures)


def show(title: str, rows: list[Row], limit: float) -> None:
    """A table for the terminal."""
    table = Table(
        "method", "patches", "seconds", "speed-up", "spread", "of bound", "waited s by rank", "MB sent by rank"
    )
    for row in rows:
        share = f"{row.speedup / limit:.1%}" if row.name.startswith("pipefusion") else ""
        table.add_row(
            row.name, str(row.patches), f"{median(row.seconds):.2f}", f"{row.speedup:.2f}×",
            f"{min(row.ratios):.2f}-{max(row.ratios):.2f}", share,
            " ".join(f"{seconds:.2f}" for seconds in row.waited),
            " ".join(f"{size / 1e6:.0f}" for size in row.sent_bytes),
        )  # fmt: skip
    console = Console()
    console.print(f"{title}; the bound of PipeFusion is S/(1+(S-1)/N) = {limit:.2f}×")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
