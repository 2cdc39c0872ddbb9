"""One device against several on this machine: one thread a rank, alternating in one run.

python -m bench.loopback --shape flux --patches 2 --patches 4
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from tests.ranks import Place, run_ranks

RESULTS = Path(__file__).parent / "results"


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Pipeline stages.")] = 2,
    patches: Annotated[list[int] | None, typer.Option(help="Patches M; may be given several times.")] = None,
    warmup: Annotated[int, typer.Option(help="Synchronous steps W.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed rounds; one more is not timed.")] = 3,
) -> None:
    """Measures and prints a table."""
    counts = patches or [2, 4]
    measured = run_ranks(ranks, measure, shape, counts, warmup, rounds, timeout=3600)
    _, call = SHAPES[shape]()
    steps = call["num_inference_steps"]
    bound = steps / (warmup + (steps - warmup) / ranks)
    rows = [_row(measured, count, bound) for count in counts]
    _show(shape, ranks, steps, bound, rows)
    RESULTS.mkdir(exist_ok=True)
    figures = {"shape": shape, "ranks": ranks, "steps": steps, "warmup": warmup, "bound": bound, "rows": rows}
    (RESULTS / f"loopback-{shape}-{ranks}.json").write_text(json.dumps(figures, indent=1) + "\n")


def measure(place: Place, shape: str, counts: list[int], warmup: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Alternates one device and each number of patches; seconds and seconds waited, by contender."""
    plain, call = SHAPES[shape]()
    contenders = {}
    for count in counts:
        config = ParallelConfig(pipefusion=place.world_size, patches=count, warmup=warmup, timeout=600)
        contenders[count] = patchpipe.parallelize(SHAPES[shape]()[0], config, group=place.join(config))
    found: dict[str, list[dict[str, float]]] = {str(name): [] for name in ("plain", *counts)}
    for turn in range(rounds + 1):
        _everybody_here(contenders)
        if place.rank == 0:
            _note(found["plain"], _timed(plain, call), 0.0, turn)
        for count, pipe in contenders.items():
            _everybody_here(contenders)
            _note(found[str(count)], _timed(pipe, call), pipe.patchpipe.last.waited_seconds, turn)
    return found


def _everybody_here(contenders: dict[int, Any]) -> None:
    """A rank that waits here leaves the cores to the others."""
    next(iter(contenders.values())).patchpipe.group.agree({})


def _timed(pipe: Any, call: dict[str, Any]) -> float:
    started = perf_counter()
    pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    return perf_counter() - started


def _note(into: list[dict[str, float]], seconds: float, waited: float, turn: int) -> None:
    if turn:  # the first is to warm up
        into.append({"seconds": seconds, "waited": waited})


def _row(measured: list[dict[str, Any]], count: int, bound: float) -> dict[str, Any]:
    plain = [entry["seconds"] for entry in measured[0]["plain"]]
    ours = [entry["seconds"] for entry in measured[0][str(count)]]
    ratios = [one / several for one, several in zip(plain, ours, strict=True)]
    return {
        "patches": count,
        "plain_seconds": plain,
        "seconds": ours,
        "ratios": ratios,
        "speedup": median(ratios),
        "of_bound": median(ratios) / bound,
        "waited": [median(entry["waited"] for entry in rank[str(count)]) for rank in measured],
    }


def _show(shape: str, ranks: int, steps: int, bound: float, rows: list[dict[str, Any]]) -> None:
    table = Table("patches", "1 device s", f"{ranks} devices s", "speed-up", "spread", "of bound", "waited s by rank")
    for row in rows:
        table.add_row(
            str(row["patches"]), f"{median(row['plain_seconds']):.2f}", f"{median(row['seconds']):.2f}",
            f"{row['speedup']:.2f}×", f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}", f"{row['of_bound']:.0%}",
            " ".join(f"{seconds:.2f}" for seconds in row["waited"]),
        )  # fmt: skip
    console = Console()
    console.print(f"{shape}, {steps} steps, {ranks} ranks of one thread, bound S/(W+(S-W)/N) = {bound:.2f}×")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
