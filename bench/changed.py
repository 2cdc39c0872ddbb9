"""How near pictures come to one device's where Ulysses exchanges only changed tokens, and the bytes it then sends.

python -m bench.changed

The bundled model paints captions that were kept out of its training, without guidance. Ranks are threads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.rounds import save
from patchpipe import ParallelConfig
from patchpipe.demo import MODEL_DIR, held_out
from tests.ranks import Place
from tests.threads import run_threads

SHARES = (0.25, 0.375, 0.4375, 0.5, 0.625, 0.75, 1.0)
SIZE, TEXT = 128, 32
Setting = tuple[float | None, bool]  # the share of tokens, or all of them; whether the others are forecast


@dataclass(frozen=True)
class Row:
    """What came of one setting.

    Attributes:
        share: Of the tokens that are exchanged; ``None`` for all.
        forecast: Whether the others are forecast.
        mean: Peak signal-to-noise ratio against one device, mean over pictures, in decibels.
        worst: The least of them.
        sent: Bytes of all ranks and steps, beside those of plain Ulysses.
        kept: Bytes a rank keeps.
    """

    share: float | None
    forecast: bool
    mean: float
    worst: float
    sent: float
    kept: int


def paint(place: Place | None, pipes: list[Any], prompts: list[str], steps: int, settings: list[Setting]) -> list[Any]:
    """Pictures, bytes sent and bytes kept of every setting; on one device if there is no place."""
    pipe, found = pipes[0 if place is None else place.rank], []
    for share, forecast in settings:
        group = None
        if place is not None:
            config = ParallelConfig(ulysses=place.world_size, changed_tokens=share, forecast=forecast)
            group = place.join(config)
            patchpipe.parallelize(pipe, config, group=group)
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        made = pipe(
            prompt=prompts, generator=generators, height=SIZE, width=SIZE, num_inference_steps=steps,
            max_sequence_length=TEXT, output_type="np",
        )  # fmt: skip
        pictures = None if made is None else made.images
        if group is None:
            found.append((pictures, 0, 0))
            continue
        found.append((pictures, group.lines["ulysses"].sent_bytes, pipe.patchpipe.last.store_bytes))
        patchpipe.restore(pipe)
    return found


def decibels(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Of each picture, in 256 steps of brightness."""
    errors = ((np.round(one * 255) - np.round(other * 255)) ** 2).mean((1, 2, 3))
    return [math.inf if error == 0 else 10 * math.log10(255**2 / error) for error in errors]


def main(
    ranks: Annotated[int, typer.Option(help="Ranks that share heads.")] = 2,
    pictures: Annotated[int, typer.Option(help="Captions.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps of a request.")] = 20,
    write: Annotated[bool, typer.Option(help="Write the figures to bench/results.")] = True,
) -> None:
    """Paints all captions with every setting, and on one device."""
    prompts = held_out()[:pictures]
    from diffusers import FluxPipeline

    pipes = [FluxPipeline.from_pretrained(MODEL_DIR) for _ in range(ranks)]  # one by one: loading is no threads' work
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    settings: list[Setting] = [(None, False), *((share, how) for share in SHARES for how in (False, True))]
    [(right, _, _)] = paint(None, pipes, prompts, steps, [(None, False)])
    per_rank = run_threads(ranks, paint, pipes, prompts, steps, settings, timeout=3000)
    whole = sum(rank[0][1] for rank in per_rank)
    rows = []
    for at, (share, forecast) in enumerate(settings):
        found = decibels(right, per_rank[0][at][0])
        sent = sum(rank[at][1] for rank in per_rank) / whole
        mean = sum(found) / len(found)
        rows.append(Row(share, forecast, mean, min(found), sent, max(rank[at][2] for rank in per_rank)))
    table = Table("share", "others", "dB, mean", "worst", "bytes", "kept, MB", title=f"{ranks} ranks, {steps} steps")
    for row in rows:
        others = "forecast" if row.forecast else "as they were"
        table.add_row(
            "all" if row.share is None else f"{row.share:g}", others, f"{row.mean:.1f}", f"{row.worst:.1f}",
            f"{row.sent:.3f}", f"{row.kept / 1e6:.1f}",
        )  # fmt: skip
    Console().print(table)
    if write:
        data = [{**asdict(row), "mean": _finite(row.mean), "worst": _finite(row.worst)} for row in rows]
        command = f"python -m bench.changed --ranks {ranks} --pictures {pictures} --steps {steps}"
        save("changed", command, {"rows": data})


def _finite(number: float) -> float | None:
    """Decibels as JSON can tell them: none of identical pictures."""
    return None if math.isinf(number) else round(number, 2)


if __name__ == "__main__":
    typer.run(main)
