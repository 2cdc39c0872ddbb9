"""Ranks that copy weights together beside ranks that each copy all, from a throttled host.

python -m bench.gathered --ranks 2 --bandwidth 0.1

Ranks are processes on this machine, whose "device" is the host: copies are held back to the bandwidth, and what ranks
give each other goes over loopback. A step's time is the difference between a long and a short request.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.one_device import request, timed
from bench.rounds import save
from patchpipe import OffloadConfig, ParallelConfig
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks

COMMAND = "python -m bench.gathered"
WIDTH, HEADS = 1024, 16
SHORT, LONG = 2, 5


def main(
    ranks: Annotated[int, typer.Option(help="Ranks of a Ulysses line.")] = 2,
    blocks: Annotated[int, typer.Option(help="Single-stream blocks, of 63 MB each.")] = 6,
    bandwidth: Annotated[float, typer.Option(help="Gigabytes a second from the host, of each rank.")] = 0.1,
    rounds: Annotated[int, typer.Option(help="Each way once a round.")] = 3,
) -> None:
    """Measures, prints a table and writes bench/results."""
    found = run_ranks(ranks, paint, blocks, bandwidth, rounds, timeout=900)[0]
    table = Table("weights", "seconds a step", "of copies", "MB a step from the host", "MB from other ranks")
    for way, one in found.items():
        table.add_row(
            way, f"{one['seconds']:.2f}", f"{one['bytes'] / bandwidth / 1e9:.2f}", f"{one['bytes'] / 1e6:,.0f}",
            f"{one['gathered'] / 1e6:,.0f}",
        )  # fmt: skip
    console = Console()
    console.print(f"{ranks} ranks, {blocks} blocks, {bandwidth:g} GB/s from the host to each")
    console.print(table)
    save(f"gathered-{ranks}", f"{COMMAND} --ranks {ranks} --blocks {blocks} --bandwidth {bandwidth:g}", found)


def paint(place: Place, blocks: int, bandwidth: float, rounds: int) -> dict[str, dict[str, float]]:
    """A rank's figures for each way; the picture is the same."""
    quieten()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {"each copies all": [], "together": []}
    pictures = []
    for _ in range(rounds):
        for way, rows in found.items():
            offload = OffloadConfig(resident=0.0, gate="off", gathered=way == "together", throttle=bandwidth)
            config = ParallelConfig(ulysses=place.world_size, warmup="all", offload=offload)
            pipe, call = pipeline(blocks)
            patchpipe.parallelize(pipe, config, group=place.join(config))
            rows.append(measure(pipe, call))
            pictures.append(rows[-1].pop("picture"))
            patchpipe.restore(pipe)
    assert len(set(pictures)) == 1, "another picture"
    return {way: {name: median(row[name] for row in rows) for name in rows[0]} for way, rows in found.items()}


def pipeline(blocks: int) -> tuple[Any, dict[str, Any]]:
    """FLUX of the same blocks, with random weights and a picture so small that copies are what takes time."""
    pipe = tiny.pipeline("flux")
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=blocks, attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH, pooled_projection_dim=16,
        axes_dims_rope=(16, 24, 24),
    ).eval()  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**tiny.call_arguments("flux", guided=False), "output_type": "latent"}


def measure(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Figures of a step."""
    short = timed(partial(request, pipe, call, SHORT))
    offload = pipe.patchpipe.offload
    bytes_before, gathered_before = offload.stats.bytes, offload.stats.gathered
    made: list[Any] = []
    long = timed(lambda: made.append(request(pipe, call, LONG)))
    return {
        "seconds": (long - short) / (LONG - SHORT),
        "bytes": (offload.stats.bytes - bytes_before) / LONG,
        "gathered": (offload.stats.gathered - gathered_before) / LONG,
        "picture": 0.0 if made[0] is None else float(made[0].images.double().sum()),
    }


if __name__ == "__main__":
    typer.run(main)
