"""Peak memory of each rank while it loads its share of a checkpoint that is made on the spot.

python -m bench.loading --gigabytes 2 --ranks 4
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.support.ranks import Place, run_ranks

RESULTS = Path(__file__).parent / "results" / "loading.json"


def main(
    gigabytes: Annotated[float, typer.Option(help="Least size of the transformer's checkpoint.")] = 2.0,
    ranks: Annotated[int, typer.Option(help="Pipeline stages.")] = 4,
    result: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measures and prints a table."""
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(Path(folder), gigabytes)
        found = run_ranks(ranks, load, folder, timeout=600)
    table = Table("rank", "owns GiB", "peak over base GiB", "share of checkpoint", "seconds")
    for rank, row in enumerate(found):
        table.add_row(
            str(rank), f"{row['owned']:.2f}", f"{row['peak']:.2f}", f"{row['peak'] / size:.0%}", f"{row['seconds']:.1f}"
        )
    console = Console()
    console.print(f"checkpoint {size:.2f} GiB in bfloat16, {ranks} ranks")
    console.print(table)
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"checkpoint_gib": size, "ranks": found}, indent=1) + "\n")


def make_checkpoint(folder: Path, gigabytes: float) -> float:
    """Saves a FLUX-shaped pipeline of at least the given size, sharded; returns its transformer's GiB."""
    from diffusers import FluxTransformer2DModel

    pipe = tiny.pipeline("flux")
    width = 1024
    per_single = (3 * width**2 + 4 * width**2 + 5 * width**2 + 3 * width**2) * 2 / 2**30
    blocks = int(gigabytes / per_single) + 1
    torch.set_default_dtype(torch.bfloat16)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=blocks, attention_head_dim=64, num_attention_heads=width // 64,
        joint_attention_dim=tiny.WIDTH, pooled_projection_dim=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder, max_shard_size="500MB")
    return sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")) / 2**30


def load(place: Place, folder: str) -> dict[str, Any]:
    """Loads this rank's share; GiB."""
    base = resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = perf_counter()
    config = ParallelConfig(pipefusion=place.world_size)
    pipe = patchpipe.from_pretrained(folder, config, dtype="bfloat16", group=place.join(config))
    seconds = perf_counter() - started
    parameters = [p for p in pipe.transformer.parameters() if not p.is_meta]
    owned = sum(p.numel() * p.element_size() for p in parameters) / 2**30
    return {"owned": owned, "peak": resident("VmHWM") - base, "seconds": seconds}


def resident(field: str = "VmRSS") -> float:
    """Resident memory of this process in GiB, mapped file pages included."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    typer.run(main)
