"""One device: what the engine costs beside plain diffusers, and how a patch's time falls with its tokens.

python -m bench.one_device --shape flux
python -m bench.one_device --shape flux-real --device cuda --dtype bf16

The latent goes through the whole model on one rank in 1, 2, 4, … patches. A step's time is the difference between a
long and a short request, so that text, warm-up and VAE drop out.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import patchpipe
from bench.contenders import AS_MEASURED
from bench.rounds import FEW_STEPS, keep_freed_memory, save
from bench.shapes import SHAPES
from patchpipe import ParallelConfig
from patchpipe.loading.dtypes import as_torch, dtype_name
from tests.support.ranks import quieten

COMMAND = "python -m bench.one_device"


def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "flux",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    patches: Annotated[str, typer.Option(help="Numbers of patches.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(help="Timed rounds; one more is not timed.")] = 3,
    steps: Annotated[int, typer.Option(help="Denoising steps of the long request.")] = 6,
) -> None:
    """Measures, prints a table and writes bench/results."""
    quieten()
    torch.set_num_threads(1)
    keep_freed_memory()
    counts = [int(text) for text in patches.split(",")]
    pipe, call = build(shape, device, dtype)
    found: dict[int, list[float]] = {count: [] for count in (0, *counts)}  # 0: plain diffusers
    for turn in range(rounds + 1):
        for count, seconds in found.items():
            spent = step_seconds(pipe, call, count, steps)
            if turn:
                seconds.append(spent)
    rows = [row(count, found[count], found[0], SHAPES[shape].image) for count in found]
    show(f"{shape} on {device}, {dtype}", rows)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    figures = {"shape": shape, "device": name, "dtype": dtype, "steps": steps, "patches_of_one": rows}
    suffix = "" if device == "cpu" else f"-{device}"
    save(f"one-{shape}{suffix}", f"{COMMAND} --shape {shape} --patches {patches} --rounds {rounds}", figures)


def build(shape: str, device: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device; noise comes from the host so that it is the same everywhere."""
    pipe, call = SHAPES[shape].build()
    pipe.to(device, as_torch(dtype_name(dtype) or "float32"))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "output_type": "latent"}


def step_seconds(pipe: Any, call: dict[str, Any], patches: int, steps: int) -> float:
    """Seconds of one steady step; ``patches`` of 0 is plain diffusers."""
    if patches:
        patchpipe.parallelize(pipe, ParallelConfig(patches=patches, **AS_MEASURED))
    try:
        short, long = (timed(lambda count=count: request(pipe, call, count)) for count in (FEW_STEPS, steps))
    finally:
        if patches:
            patchpipe.restore(pipe)
    return (long - short) / (steps - FEW_STEPS)


def request(pipe: Any, call: dict[str, Any], steps: int) -> Any:
    """One request."""
    return pipe(**{**call, "num_inference_steps": steps}, generator=torch.Generator().manual_seed(0))


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device is done."""
    wait()
    started = perf_counter()
    work()
    wait()
    return perf_counter() - started


def wait() -> None:
    """Waits for what is queued on a CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(patches: int, seconds: list[float], plain: list[float], tokens: int) -> dict[str, Any]:
    """Figures of one number of patches, each beside plain diffusers in the same round."""
    ratios = [own / other for own, other in zip(seconds, plain, strict=True)]
    return {
        "patches": patches, "tokens": tokens // max(1, patches), "step_seconds": seconds, "ratios": ratios,
        "ratio": median(ratios), "patch_seconds": median(seconds) / max(1, patches),
    }  # fmt: skip


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """A table for the terminal."""
    table = Table("patches", "tokens", "ms a step", "beside plain", "spread", "ms a patch")
    for one in rows:
        table.add_row(*cells(one))
    console = Console()
    console.print(title)
    console.print(table)


def cells(one: dict[str, Any]) -> list[str]:
    """A row of the table."""
    spread = f"{min(one['ratios']):.3f}-{max(one['ratios']):.3f}"
    step, patch = median(one["step_seconds"]) * 1e3, one["patch_seconds"] * 1e3
    name = str(one["patches"] or "plain")
    return [name, str(one["tokens"]), f"{step:.1f}", f"{one['ratio']:.3f}", spread, f"{patch:.1f}"]


if __name__ == "__main__":
    typer.run(main)
