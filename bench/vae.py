"""Peak memory, time and error of a VAE spread over ranks, against the whole on one.

python -m bench.vae --model kl:1024 --ranks 1,2,4
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.loading import resident
from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.vae import join_rows, spread_vae
from tests.support.ranks import Place, run_ranks

M_MMAP_THRESHOLD = -3  # mallopt's number for it
RESULTS = Path(__file__).parent / "results" / "vae.json"
WIDTHS = (64, 128, 128)
FRAMES = 5


def build_kl(pixels: int) -> tuple[Any, Tensor, Tensor]:
    """An image VAE, a latent and a picture."""
    vae = AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        latent_channels=16,
        layers_per_block=2,
    )
    return vae, torch.randn(1, 16, pixels // 4, pixels // 4), torch.randn(1, 3, pixels, pixels)


def build_tiny(pixels: int) -> tuple[Any, Tensor, Tensor]:
    """The small image VAE, a latent and a picture."""
    return AutoencoderTiny(), torch.randn(1, 4, pixels // 8, pixels // 8), torch.randn(1, 3, pixels, pixels)


def build_wan(pixels: int) -> tuple[Any, Tensor, Tensor]:
    """A video VAE of a third of its real width, a latent and a video."""
    latent = torch.randn(1, 16, 1 + FRAMES // 4, pixels // 8, pixels // 8)
    return AutoencoderKLWan(base_dim=32), latent, torch.randn(1, 3, FRAMES, pixels, pixels)


BUILDERS = {"kl": build_kl, "tiny": build_tiny, "wan": build_wan}


def main(
    model: Annotated[list[str], typer.Option(help="Name and height in pixels.")] = ["kl:1024", "tiny:1024", "wan:384"],  # noqa: B006
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, the first being 1.")] = "1,2,4",
    result: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Measures and prints a table."""
    rows: list[dict[str, Any]] = []
    for name, pixels in (entry.split(":") for entry in model):
        for method in ("decode", "encode"):
            rows += measure_all(name, int(pixels), method, [int(count) for count in ranks.split(",")])
    show(rows)
    result.parent.mkdir(exist_ok=True)
    result.write_text(
        json.dumps({"dtype": "float32", "widths": WIDTHS, "frames": FRAMES, "rows": rows}, indent=1) + "\n"
    )


def measure_all(name: str, pixels: int, method: str, ranks: list[int]) -> list[dict[str, Any]]:
    """One row per number of ranks; the first is what the others are compared with."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in ranks:
            found = run_ranks(count, measure, name, pixels, method, folder, timeout=900)
            rows.append({"model": name, "pixels": pixels, "method": method, "ranks": count, "each": found})
    for row in rows:
        row["error"] = row["each"][0]["error"]
        row["share"] = max(rank["peak"] for rank in row["each"]) / rows[0]["each"][0]["peak"]
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the figures."""
    table = Table("model", "method", "ranks", "peak MiB per rank", "share of whole", "error", "seconds", "sent MiB")
    for row in rows:
        table.add_row(
            f"{row['model']} {row['pixels']} px",
            row["method"],
            str(row["ranks"]),
            ", ".join(f"{rank['peak']:.0f}" for rank in row["each"]),
            f"{row['share']:.0%}",
            f"{row['error']:.1e}",
            f"{max(rank['seconds'] for rank in row['each']):.1f}",
            ", ".join(f"{rank['sent']:.0f}" for rank in row["each"]),
        )
    Console(width=120).print(table)


@torch.no_grad()
def measure(place: Place, name: str, pixels: int, method: str, folder: str) -> dict[str, Any]:
    """One rank's peak over its resident memory before the call, in MiB; the first call of all is the reference."""
    # Whatever is freed leaves the process at once, so that its size tells what is alive and not how malloc pools.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    torch.manual_seed(0)
    vae, latent, picture = BUILDERS[name](pixels)
    vae.eval()
    given = latent if method == "decode" else picture
    group = join_rows(ProcessGroups(place.store, 600), place.rank, place.world_size)
    if place.world_size > 1:
        spread_vae(vae, group)
    few = given.shape[-1] // 8
    getattr(vae, method)(given[..., : 4 * few, :few])  # libraries and weights are resident from here on
    sent_before, base = group.sent_bytes, resident()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    started = perf_counter()
    output = getattr(vae, method)(given)
    seconds = perf_counter() - started
    peak = (resident("VmHWM") - base) * 1024
    sent = (group.sent_bytes - sent_before) / 2**20
    return {"peak": peak, "seconds": seconds, "sent": sent, "error": compare(output, Path(folder) / "whole.pt")}


def compare(output: Any, reference: Path) -> float | None:
    """Largest difference to the reference, relative to its largest value; the first to come becomes the reference."""
    found = output.latent_dist.parameters if "latent_dist" in output else next(iter(output.values()), None)
    if found is None:
        return None
    if not reference.exists():
        torch.save(found, reference)
    whole = torch.load(reference)
    return float((found - whole).abs().max() / whole.abs().max())


if __name__ == "__main__":
    typer.run(main)
