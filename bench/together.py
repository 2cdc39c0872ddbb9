"""Requests one after the other against the same in flight together, in turns on this machine: one thread a rank.

python -m bench.together
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.rounds import meet, save
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from tests.support.ranks import Place, run_ranks

WARMUPS = (1, "all")
SERIAL, TOGETHER = "one after the other", "in flight together"
TIMEOUT = 600.0


@dataclass(frozen=True)
class Row:
    """What a schedule came to.

    Attributes:
        warmup: Its warm-up.
        seconds: Of each round, by way.
        waited: Median seconds each rank waited for others, by way.
        ideal: The ratio that the synchronous steps alone would give.
    """

    warmup: int | str
    seconds: dict[str, list[float]]
    waited: dict[str, list[float]]
    ideal: float

    @property
    def ratios(self) -> list[float]:
        """How much less time the requests take together, of each round."""
        return [one / other for one, other in zip(self.seconds[SERIAL], self.seconds[TOGETHER], strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """For a file of results."""
        return {**self.__dict__, "ratios": self.ratios, "speedup": median(self.ratios)}


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    ranks: Annotated[int, typer.Option(help="Pipeline stages: processes of one thread.")] = 2,
    requests: Annotated[int, typer.Option(help="Requests in flight together.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed rounds; one more is not timed.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps of each request.")] = 8,
) -> None:
    """Measures, prints a table and writes bench/results."""
    found = run_ranks(ranks, measure, shape, requests, rounds, steps, timeout=3600)
    rows = [row_of(warmup, [rank[str(warmup)] for rank in found], requests, steps) for warmup in WARMUPS]
    show(f"{shape}, {requests} requests of {steps} steps, {ranks} ranks of one thread", rows)
    command = f"python -m bench.together --shape {shape} --ranks {ranks} --requests {requests} --steps {steps}"
    about = {"shape": shape, "ranks": ranks, "requests": requests, "steps": steps}
    save("together", command, {**about, "rows": [row.as_dict() for row in rows]})


def measure(place: Place, shape: str, requests: int, rounds: int, steps: int) -> dict[str, dict[str, Any]]:
    """This rank's seconds of every round, and how long it waited, by warm-up and way."""
    torch.set_num_threads(1)
    pipes = {str(warmup): _parallel(place, shape, warmup) for warmup in WARMUPS}
    found: dict[str, dict[str, Any]] = {name: {SERIAL: [], TOGETHER: []} for name in pipes}
    for turn in range(rounds + 1):
        for name, (pipe, call) in pipes.items():
            for way in (SERIAL, TOGETHER):
                calls = [_seeded(call, steps, seed) for seed in range(requests)]
                meet(place, f"{turn}/{name}/{way}")
                started = perf_counter()
                waited = _paint(pipe, calls, way)
                if turn:
                    found[name][way].append({"seconds": perf_counter() - started, "waited": waited})
    meet(place, "end")
    return found


def row_of(warmup: int | str, ranks: list[dict[str, Any]], requests: int, steps: int) -> Row:
    """The figures of one schedule; the requests are over when rank 0 has all their latents."""
    seconds = {way: [entry["seconds"] for entry in entries] for way, entries in ranks[0].items()}
    waited = {way: [median(entry["waited"] for entry in rank[way]) for rank in ranks] for way in seconds}
    return Row(warmup, seconds, waited, ideal(warmup, requests, len(ranks), steps))


def ideal(warmup: int | str, requests: int, ranks: int, steps: int) -> float:
    """How much faster requests are together if synchronous steps alone leave stages idle, all but one.

    With equal stages and hops that take no time, a synchronous step alone takes as long as on one device, where several
    in flight keep as many stages busy as there are requests. The fill and the drain of the whole set take away from
    that; those of each request, and hops that it waits for, add to it.
    """
    synchronous = steps if warmup == "all" else min(int(warmup), steps)
    streamed = (steps - synchronous) / ranks
    return (synchronous + streamed) / (synchronous / min(requests, ranks) + streamed)


def show(title: str, rows: list[Row]) -> None:
    """A table for the terminal."""
    table = Table("warm-up", SERIAL, TOGETHER, "ratio", "spread", "ideal", "waited s by rank", "together")
    for row in rows:
        times = [f"{median(row.seconds[way]):.2f} s" for way in (SERIAL, TOGETHER)]
        waits = [" ".join(f"{seconds:.2f}" for seconds in row.waited[way]) for way in (SERIAL, TOGETHER)]
        spread = f"{min(row.ratios):.2f}-{max(row.ratios):.2f}"
        table.add_row(str(row.warmup), *times, f"{median(row.ratios):.2f}×", spread, f"{row.ideal:.2f}×", *waits)
    console = Console()
    console.print(title)
    console.print(table)


def _parallel(place: Place, shape: str, warmup: Any) -> tuple[Any, dict[str, Any]]:
    pipe, call = SHAPES[shape].build()
    config = ParallelConfig(pipefusion=place.world_size, warmup=warmup, timeout=TIMEOUT)
    return patchpipe.parallelize(pipe, config, group=place.join(config)), call


def _seeded(call: dict[str, Any], steps: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {**call, "num_inference_steps": steps, "generator": generator, "output_type": "latent"}


def _paint(pipe: Any, calls: list[dict[str, Any]], way: str) -> float:
    """Paints all of them; gives the seconds this rank waited."""
    if way == TOGETHER:
        pipe.patchpipe.together(calls)
        return sum(one.waited_seconds for one in pipe.patchpipe.stats)
    waited = 0.0
    for call in calls:
        pipe(**call)
        waited += pipe.patchpipe.last.waited_seconds
    return waited


if __name__ == "__main__":
    typer.run(main)
