"""How near pictures come to one device's where less than all is sent, and how many bytes then are.

python -m bench.lossy changed
python -m bench.lossy compress --ranks 4

The bundled model paints captions that were kept out of its training, without guidance. Ranks are threads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.rounds import save
from patchpipe import ParallelConfig
from patchpipe.demo import MODEL_DIR, held_out
from tests.support.ranks import Place
from tests.support.threads import run_threads

SHARES = (0.25, 0.375, 0.4375, 0.5, 0.625, 0.75, 1.0)
SIZE, TEXT, PATCHES = 128, 32, 4
Layout = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What came of one layout.

    Attributes:
        layout: The layout.
        mean: Peak signal-to-noise ratio against one device, mean over pictures, in decibels; ``None`` if identical.
        worst: The least of them.
        sent: Bytes of all ranks and steps, beside those of the layout that sends all.
        kept: Bytes of keys, values and the like that a rank keeps.
    """

    layout: Layout
    mean: float | None
    worst: float | None
    sent: float
    kept: int


def pipelines(count: int) -> list[Any]:
    """The bundled model, so many times; loaded one by one, which is no work for threads."""
    from diffusers import FluxPipeline

    pipes = [FluxPipeline.from_pretrained(MODEL_DIR) for _ in range(count)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


def paint(place: Place | None, pipes: list[Any], prompts: list[str], steps: int, layouts: list[Layout]) -> list[Any]:
    """Pictures, bytes sent and bytes kept of every layout; on one device if there is no place."""
    pipe, found = pipes[0 if place is None else place.rank], []
    for layout in layouts:
        group = None
        if place is not None:
            config = ParallelConfig(**layout)
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
        lines = sum(line.sent_bytes for line in group.lines.values())
        found.append((pictures, lines or pipe.patchpipe.last.sent_bytes, pipe.patchpipe.last.store_bytes))
        patchpipe.restore(pipe)
    return found


def decibels(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Of each picture, in 256 steps of brightness."""
    errors = ((np.round(one * 255) - np.round(other * 255)) ** 2).mean((1, 2, 3))
    return [math.inf if error == 0 else 10 * math.log10(255**2 / error) for error in errors]


def layouts_of(what: str, ranks: int) -> list[list[Layout]]:
    """Groups of layouts: the first of each sends all."""
    if what == "changed":
        ulysses = {"ulysses": ranks}
        lossy = [{**ulysses, "changed_tokens": share, "forecast": how} for share in SHARES for how in (False, True)]
        return [[ulysses, *lossy]]
    bases: list[Layout] = [{"pipefusion": ranks, "patches": PATCHES, "split_batch": False}, {"distrifusion": ranks}]
    return [
        [{**base, "forecast": forecast, "compress": how} for how in (None, "int8")]
        for base in bases
        for forecast in (False, True)
    ]


def main(
    what: Annotated[Literal["changed", "compress"], typer.Argument(help="What makes it less.")],
    ranks: Annotated[int, typer.Option(help="Ranks.")] = 2,
    pictures: Annotated[int, typer.Option(help="Captions.")] = 12,
    steps: Annotated[int, typer.Option(help="Steps of a request.")] = 20,
    write: Annotated[bool, typer.Option(help="Write the figures to bench/results.")] = True,
) -> None:
    """Paints all captions with every layout, and on one device."""
    prompts, pipes, groups = held_out()[:pictures], pipelines(ranks), layouts_of(what, ranks)
    [(right, _, _)] = paint(None, pipes, prompts, steps, [{}])
    flat = [layout for group in groups for layout in group]
    per_rank = run_threads(ranks, paint, pipes, prompts, steps, flat, timeout=3000)
    rows, whole = [], 1.0
    firsts = [id(group[0]) for group in groups]
    for at, layout in enumerate(flat):
        found, sent = decibels(right, per_rank[0][at][0]), sum(rank[at][1] for rank in per_rank)
        whole = sent if id(layout) in firsts else whole
        kept = max(rank[at][2] for rank in per_rank)
        rows.append(Row(layout, _finite(sum(found) / len(found)), _finite(min(found)), sent / whole, kept))
    table = Table("layout", "dB, mean", "worst", "bytes", "kept, MB", title=f"{ranks} ranks, {steps} steps")
    for row in rows:
        told = [str(number or "identical") for number in (row.mean, row.worst)]
        table.add_row(ParallelConfig(**row.layout).describe(), *told, f"{row.sent:.3f}", f"{row.kept / 1e6:.1f}")
    Console().print(table)
    if write:
        command = f"python -m bench.lossy {what} --ranks {ranks} --pictures {pictures} --steps {steps}"
        save(f"{what}-{ranks}", command, {"rows": [asdict(row) for row in rows]})


def _finite(number: float) -> float | None:
    """Decibels as JSON can tell them: none of identical pictures."""
    return None if math.isinf(number) else round(number, 2)


if __name__ == "__main__":
    typer.run(main)
