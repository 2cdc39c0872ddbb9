"""Compiled blocks against eager ones, on one process and on several, alternating in one run.

python -m bench.compile --shape flux

Blocks are compiled before the clock starts.
"""

from __future__ import annotations

from typing import Annotated

import typer

from bench.contenders import COMPILED, PLAIN
from bench.loopback import show
from bench.rounds import Row, bound, rows_of, save, take_turns
from bench.shapes import SHAPES
from tests.support.ranks import run_ranks

STEPS = 8
ALONE = ("pipefusion:1", "pipefusion:3")
TOGETHER = ("pipefusion:3",)


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Processes of one thread, beside the runs on one.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = STEPS,
) -> None:
    """Measures, prints two tables and writes bench/results/compile.json."""
    figures = []
    for count, names in ((1, ALONE), (ranks, TOGETHER)):
        every = [PLAIN, *(each for name in names for each in (name, name + COMPILED))]
        rows: list[Row] = rows_of(run_ranks(count, take_turns, shape, every, rounds, steps, timeout=3600))
        limit = bound(steps, count)
        show(f"{shape}, {steps} steps, {count} ranks of one thread", rows, limit)
        figures.append({"ranks": count, "bound": limit, "rows": [row.as_dict() for row in rows]})
    command = f"python -m bench.compile --shape {shape} --rounds {rounds} --steps {steps}"
    save("compile", command, {"shape": shape, "steps": steps, "layouts": figures})


if __name__ == "__main__":
    typer.run(main)
