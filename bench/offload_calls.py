"""Two calls of guidance in a step, whose weights come from a throttled host: for each call, or once for both.

python -m bench.offload_calls

Device, link and clock are those of ``bench.offload``; so is the engine, with the threads of the two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import offload as one_call
from bench.offload import CHUNK, EXCHANGED, EXCHANGES, MEGABYTE, Model, Row, offloaded
from bench.rounds import save
from patchpipe import OffloadConfig
from patchpipe.offload.model import Passing, waiting

COMMAND = "python -m bench.offload_calls"
CALLS = 2


def main(
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 6,
    rounds: Annotated[int, typer.Option(help="Steps, after one that is not counted.")] = 3,
) -> None:
    """Measures, prints a table and writes bench/results."""
    rows = list(run(blocks, rounds))
    table = Table("MB/s", "stays", "way", "s a step", "model", "MB a step", "beside whole layers")
    for row in rows:
        layers = next(
            one.seconds for one in rows
            if (one.bandwidth, one.resident, one.name) == (row.bandwidth, row.resident, "whole layers, for each call")
        )  # fmt: skip
        table.add_row(
            str(row.bandwidth), f"{row.resident:.0%}", row.name, f"{row.seconds:.2f}", f"{row.predicted:.2f}",
            f"{row.megabytes:.0f}", f"{layers / row.seconds:.2f}×",
        )  # fmt: skip
    Console().print(table)
    save("offload-calls", f"{COMMAND} --blocks {blocks} --rounds {rounds}", {"rows": [asdict(row) for row in rows]})


def run(blocks: int, rounds: int) -> Iterator[Row]:
    """All ways, on all links."""
    whole = one_call.MATRICES * one_call.MATRIX[0] * one_call.MATRIX[1] * 4 / MEGABYTE
    for bandwidth in one_call.BANDWIDTHS:
        model = Model(blocks)
        for share in one_call.RESIDENT:
            layers = OffloadConfig(resident=share, chunk=whole, depth=1, gate="off")
            chunks = OffloadConfig(resident=share, chunk=CHUNK, gate="on")
            yield step("whole layers, for each call", model, bandwidth, layers, rounds, together=False)
            yield step("chunks and gate, for each call", model, bandwidth, chunks, rounds, together=False)
            yield step("chunks and gate, once for both", model, bandwidth, chunks, rounds, together=True)


def step(way: str, model: Model, bandwidth: int, asked: OffloadConfig, rounds: int, *, together: bool) -> Row:
    """A step of two calls."""
    with offloaded(model, bandwidth, asked) as (offload, device):
        model.on[:] = [device]
        stage: Any = SimpleNamespace(exchange_work=lambda _: None)
        calls: list[Callable[[], None]] = [lambda: _check(model)] * CALLS

        def one() -> None:
            if together:
                offload.together(stage, calls)
            else:
                for call in calls:
                    call()

        one()
        clock, copied, stalled = device.link.clock, offload.stats.bytes, offload.stats.stalled_seconds
        device.exchanges.clear()
        began = clock.now()
        for _ in range(rounds):
            one()
        seconds, size = (clock.now() - began) / rounds, (offload.stats.bytes - copied) / rounds
        chosen = offload.chosen
        assert chosen is not None
        times = CALLS if together else 1
        exchanges = [times * EXCHANGES * EXCHANGED / bandwidth / MEGABYTE] * len(model.blocks)
        spent = [times * each for each in one_call._seconds(model, bandwidth)]
        passing = Passing(chosen.streamed, spent, exchanges, times * EXCHANGES)
        predicted = waiting(passing, replace(chosen.transfers, bandwidth=bandwidth * MEGABYTE)).seconds
        waited = (offload.stats.stalled_seconds - stalled) / rounds
        exchange = 1000 * sum(device.exchanges) / len(device.exchanges)
        predicted *= CALLS / times
        return Row(way, bandwidth, chosen.share, seconds, predicted, size / MEGABYTE, waited, exchange)


def _check(model: Model) -> None:
    """One call; a block that computed with other weights shows."""
    assert abs(float(model(torch.zeros(1))) - model.expected) < 1e-3


if __name__ == "__main__":
    typer.run(main)
