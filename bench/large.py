"""FLUX.1 at its own sizes, 24 GB of random weights, in two processes that may hold a third of their share each.

python -m bench.large --folder /tmp/flux-large

The rest of the weights is read from the files for every pass (``tier=disk``), so 24 GB of disk and 16 GB of memory are
enough. Reading is held back to a bandwidth below the disk's, as the files may be in the system's memory in part.
Seconds of a step are set beside what the planner says of a machine with this bandwidth and a core's measured rate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import patchpipe
from bench.one_device import request, timed
from bench.rounds import save
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.planner.machine.here import profile_of
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import predict
from patchpipe.planner.work.named import Asked, workload_for
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks

COMMAND = "python -m bench.large"
DUAL, SINGLE = 19, 38
SHARD = "transformer/diffusion_pytorch_model-{:05d}.safetensors"
SHORT, LONG = 1, 3
PIXELS, WORDS = 128, 32
POOL = 2**26  # random numbers; weights are pieces of them


def main(
    folder: Annotated[Path, typer.Option(help="Where the model is, or is to be made.")],
    share: Annotated[float, typer.Option(help="Of a rank's weights, that it may hold.")] = 1 / 3,
    bandwidth: Annotated[float, typer.Option(help="Gigabytes a second from disk, of each rank.")] = 0.3,
    ranks: Annotated[int, typer.Option(help="Pipeline stages.")] = 2,
) -> None:
    """Makes the model if need be, measures, and prints a table."""
    quieten()
    console = Console()
    size = make(folder)
    memory = share * size / ranks / 2**30
    offload = OffloadConfig(memory=memory, tier="disk", throttle=bandwidth)
    config = ParallelConfig(pipefusion=ranks, patches=ranks, warmup="all", timeout=600, offload=offload)
    profile = measured(ranks)
    asked = Asked(PIXELS, PIXELS, steps=LONG, text_tokens=WORDS, dtype="bf16")
    expected = predict(workload_for(folder, asked), config, profile)
    console.print(
        f"{size / 1e9:.1f} GB of weights, {ranks} ranks that hold {memory:.2f} GiB each and read {bandwidth:g} GB/s; a "
        f"core computes {profile.device.rate / 1e9:.0f} GFLOP/s"
    )
    console.print(f"predicted: {expected.seconds / LONG:.1f} s a step")
    found = run_ranks(ranks, paint, folder, config, timeout=3000)
    table = Table("rank", "seconds a step", "GB a step", "predicted", "memory at the end, GiB")
    for rank, one in enumerate(found):
        table.add_row(
            str(rank), f"{one['seconds']:.1f}", f"{one['bytes'] / 1e9:.2f}", f"{expected.uploads[rank] / 1e9:.2f}",
            f"{one['memory']:.2f}",
        )  # fmt: skip
    console.print(table)
    figures = {"bytes": size, "memory": memory, "device": asdict(profile.device), "predicted": expected.seconds / LONG}
    save("large", f"{COMMAND} --folder {folder.name}", {**figures, "uploads": expected.uploads, "ranks": found})


# -- the model -----------------------------------------------------------------------------------


def make(folder: Path) -> int:
    """Saves the pipeline, if it is not there; bytes of its transformer."""
    if not (folder / "model_index.json").exists():
        pipe = tiny.pipeline("flux")
        pipe.save_pretrained(folder)
        for old in (folder / "transformer").glob("*.safetensors"):
            old.unlink()
        with init_empty_weights():
            model = FluxTransformer2DModel(
                in_channels=16, num_layers=DUAL, num_single_layers=SINGLE, joint_attention_dim=tiny.WIDTH,
                pooled_projection_dim=16,
            )  # fmt: skip
        model.save_config(folder / "transformer")
        write(model, folder)
    return sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors"))


def write(model: torch.nn.Module, folder: Path) -> None:
    """Random weights, a file for each block."""
    places: dict[str, str] = {}
    draw = torch.Generator().manual_seed(0)
    pool = torch.empty(POOL, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=draw)
    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(".".join(name.split(".")[:2]), {})[name] = parameter
    for number, parameters in enumerate(track(groups.values(), "writing the model")):
        file = SHARD.format(number)
        save_file(dict(filled(parameters, pool, draw)), folder / file, {"format": "pt"})
        places.update(dict.fromkeys(parameters, Path(file).name))
    index = {"metadata": {}, "weight_map": places}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def filled(parameters: dict[str, Tensor], pool: Tensor, draw: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Each parameter with numbers of the pool."""
    for name, parameter in parameters.items():
        start = int(torch.randint(POOL // 2, (), generator=draw))
        piece = pool[start : start + min(parameter.numel(), POOL // 2)]
        repeated = piece.repeat(-(-parameter.numel() // piece.numel()))[: parameter.numel()]
        yield name, repeated.reshape(parameter.shape).clone()


# -- the machine ---------------------------------------------------------------------------------


def measured(ranks: int) -> Profile:
    """This machine, with a core's rate at the sizes that matter."""
    torch.set_num_threads(1)
    tokens = (PIXELS // 16) ** 2 + WORDS
    rows, matrix = torch.randn(tokens, 3072).bfloat16(), torch.randn(12288, 3072).bfloat16()
    spent = min(timed(lambda: torch.nn.functional.linear(rows, matrix)) for _ in range(8))
    profile = profile_of(["cpu"] * ranks, ranks)
    flops = 2 * tokens * matrix.numel() / spent
    return replace(profile, device=replace(profile.device, flops=flops, efficiency=1.0, memory=2**40))


# -- a rank --------------------------------------------------------------------------------------


def paint(place: Place, folder: Path, config: ParallelConfig) -> dict[str, float]:
    """A rank's figures of a step."""
    torch.set_num_threads(1)
    pipe = patchpipe.from_pretrained(folder, config, dtype="bf16", group=place.join(config))
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {
        **tiny.call_arguments("flux", guided=False, height=PIXELS, width=PIXELS), "max_sequence_length": WORDS,
        "output_type": "latent",
    }  # fmt: skip
    request(pipe, call, SHORT)
    short = timed(lambda: request(pipe, call, SHORT))
    before = pipe.patchpipe.offload.stats.bytes
    long = timed(lambda: request(pipe, call, LONG))
    moved = pipe.patchpipe.offload.stats.bytes - before
    memory = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return {"seconds": (long - short) / (LONG - SHORT), "bytes": moved / LONG, "memory": int(memory.split()[1]) / 2**20}


if __name__ == "__main__":
    typer.run(main)
